"""``python -m scout_hf``: the command line, also of a checkout that is not installed."""

from scout_hf.cli import app

if __name__ == "__main__":
    app(prog_name="scout-hf")
