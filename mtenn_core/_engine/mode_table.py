"""The gradient modes by name, and the check of a model's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import SupportsIndex

from mtenn_core._engine.graph import Graph
from mtenn_core._engine.mode import Mode, Options
from mtenn_core._engine.recomputed import Recomputed
from mtenn_core._engine.stored import Stored

# Another mode is another entry here, and another name in mtenn_core.model.GradientMode.
MODES: Mapping[str, Mode] = {mode.name: mode for mode in (Graph(), Stored(), Recomputed())}


def checked_mode(options: Options) -> Mode:
    """Return the mode that the options name.

    Raises
    ------
    ValueError, TypeError : an option that does not exist, or two that exclude each other
    """
    if options.gradients not in MODES:
        raise ValueError(f"gradients must be one of {tuple(MODES)}; found {options.gradients!r}")
    skip_below, collate, chunk_size = options.skip_below, options.collate, options.chunk_size
    skip = 0 if skip_below is None else skip_below
    if not (isinstance(skip, int | float) and 0 <= skip < 1):
        raise ValueError(
            "skip_below must be a number that is at least 0 and below 1, or None; found"
            f" {skip_below!r}"
        )
    if not (collate is None or callable(collate)):
        raise TypeError(
            "collate must be a function that makes a batch of a list of poses, such as torch.stack;"
            f" found {collate!r}"
        )
    if chunk_size is not None:
        if not isinstance(chunk_size, SupportsIndex) or chunk_size < 1:
            raise ValueError(
                "chunk_size must be a whole number of poses, at least 1, or None; found"
                f" {chunk_size!r}"
            )
        if chunk_size > 1 and collate is None:
            raise ValueError("chunk_size > 1 needs collate, which makes one batch of several poses")
    mode = MODES[options.gradients]
    mode.check_options(options)
    return mode
