"""`python -m dfrot_lab` is the `dfrot-lab` command."""

from dfrot_lab.cli.app import app

app()
