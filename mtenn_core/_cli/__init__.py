"""The command ``mtenn``: list combinations, check their gradients, and write a new plugin.

$ mtenn list
$ mtenn info boltzmann
$ mtenn info model.pt
$ mtenn check boltzmann --arg kT=0.593
$ mtenn new my-rule
"""

from mtenn_core._cli.commands import main

__all__ = ["main"]
