"""The tiny task, the tiny model and the recipe that `groupwise quickstart` runs with no download."""
