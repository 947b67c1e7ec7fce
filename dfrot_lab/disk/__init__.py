"""Compute once, keep, verify: artefacts, downloads, tables."""
