"""The computation of predictions and gradients.

A call is checked and cut into chunks (``call``, ``chunk``), a mode predicts all poses (``graph``,
``stored``, ``recomputed``), and the combination makes one number per compound (``evaluation``).
"""
