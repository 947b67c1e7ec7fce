"""The worth explorer: what the rotations are worth end to end."""
