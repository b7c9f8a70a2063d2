"""The gradient modes by name."""

from __future__ import annotations

from collections.abc import Mapping

from mtenn_core._engine.graph import Graph
from mtenn_core._engine.mode import Mode
from mtenn_core._engine.recomputed import Recomputed
from mtenn_core._engine.stored import Stored

# To add a mode, add an entry here and a name in GradientMode.
MODES: Mapping[str, Mode] = {mode.name: mode for mode in (Graph(), Stored(), Recomputed())}
