"""Mode ``"graph"``: it keeps the graphs of all poses until backward, as plain autograd does."""

from __future__ import annotations

from torch import Tensor

from mtenn_core._engine.call import Call
from mtenn_core._engine.cost import ModeCost, StepTotals
from mtenn_core._engine.mode import Mode, Options, check_has_combine
from mtenn_core._engine.shared_part import nodes_of_outputs
from mtenn_core._engine.skipping import join_chunks


class Graph(Mode):
    """The mode of plain autograd. It keeps all graphs and is the reference for other modes."""

    name = "graph"
    # Autograd takes the derivative here, so that tests can compare closed forms with this mode.
    uses_closed_form = False

    def check_options(self, options: Options) -> None:
        check_has_combine(options)

    def check_group(self, options: Options) -> None:
        """Accept all groups, because each process takes the gradients of its own poses."""

    def chunk_size(self, options: Options) -> int | None:
        return 1 if options.collate is None else options.chunk_size

    def predict(self, options: Options, call: Call) -> tuple[Tensor, None]:
        predictions = [chunk.run() for chunk in call.chunks]
        shared = nodes_of_outputs(call)
        return join_chunks(predictions, skip_below=options.skip_below, shared=shared), None

    def cost(self, totals: StepTotals) -> ModeCost:
        memory = totals.gradient + totals.saved + totals.bare
        return ModeCost(self.name, totals.n_chunks, totals.n_chunks_run, round(memory))
