"""An attack that can be run again: kills, corruptions, bad inputs, hostile models, crowds of processes."""
