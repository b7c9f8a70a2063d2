"""``python -m mtenn_core``: the command ``mtenn``."""

from mtenn_core._cli import main

main(prog_name="mtenn")
