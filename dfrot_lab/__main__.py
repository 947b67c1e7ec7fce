"""`python -m dfrot_lab` is the `dfrot-lab` command."""

from .cli import app

app()
