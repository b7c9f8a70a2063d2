"""The command ``mtenn``: what is installed, and whether its gradients are right.

$ mtenn list
$ mtenn info boltzmann
$ mtenn check boltzmann --arg kT=0.593
"""

from mtenn_core._cli._commands import main

__all__ = ["main"]
