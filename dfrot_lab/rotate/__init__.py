"""How to make the transforms of a model: one file a method."""
