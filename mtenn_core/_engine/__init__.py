"""The computation of predictions and gradients.

First, a call is checked and cut into chunks (``call``, ``chunk``). Then, a mode predicts all poses
(``graph``, ``stored``, ``recomputed``). At the end, the combination makes one number per compound
(``evaluation``).
"""
