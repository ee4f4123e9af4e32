"""The recipes: one file is one way to train, read from top to bottom."""
