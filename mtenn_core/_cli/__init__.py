"""The command ``mtenn``: what is installed, whether its gradients are right, and a new plugin.

$ mtenn list
$ mtenn info boltzmann
$ mtenn check boltzmann --arg kT=0.593
$ mtenn new my-rule
"""

from mtenn_core._cli.commands import main

__all__ = ["main"]
