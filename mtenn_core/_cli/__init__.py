"""The command ``mtenn``: list combinations, check them, use them on tables, and write new ones.

$ mtenn list
$ mtenn info boltzmann
$ mtenn info model.pt
$ mtenn check boltzmann --arg kT=0.593
$ mtenn combine poses.csv boltzmann --by compound --column score --arg kT=0.593
$ mtenn new my-rule
"""

from mtenn_core._cli.commands import main

__all__ = ["main"]
