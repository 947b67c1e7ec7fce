"""The paper, experiment by experiment, and what they cost."""
