"""Load a model, know its parts, change it without changing its function."""
