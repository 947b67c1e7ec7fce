"""Pure functions on tensors and tables: no model, no disk."""
