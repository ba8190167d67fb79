"""Front doors for programs written for other trainers: each builds the one config and calls the one loop.

A door is a package of its own, knows nothing of the others, and nothing knows it: deleting one breaks nothing else.
"""
