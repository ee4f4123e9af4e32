"""The commands that make, look at and carry away models and data; each is arguments and one call."""
