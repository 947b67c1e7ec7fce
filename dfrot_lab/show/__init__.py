"""Pictures and reports of what was found; nothing here computes a result."""
