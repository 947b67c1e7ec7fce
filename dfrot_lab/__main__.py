"""`python -m dfrot_lab` is the `dfrot-lab` command."""

from dfrot_lab.cli.app import app

if __name__ == "__main__":  # not in a worker's process, which reads this file anew
    app()
