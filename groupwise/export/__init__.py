"""A trained model as other programs want it: a path in, a path out; nothing here knows how it was trained."""
