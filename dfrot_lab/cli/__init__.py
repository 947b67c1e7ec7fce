"""Every step of the notebooks as a command."""
