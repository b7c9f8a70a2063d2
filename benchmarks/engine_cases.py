"""The cases of the engine benchmark: poses, pose models, and ways to run a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from guide import GuideCombination
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mtenn_core import Combination, MultiPoseModel, registry

PLAIN, CHECKPOINT, GUIDE = "plain autograd", "checkpoint", "guide's loop"
ONE_BATCH = "plain, one batch"
# What a batch of this size computes may stay in the processor's cache.
CHUNK_SIZE = 32
CHUNKED = f"graph, chunk_size={CHUNK_SIZE}"
# Not training steps: what one would have to do anyway.
BARE, FORWARD, COPY = "gradients thrown away", "forward only", "one copy of P"
BUILT = "forward with its graph"
MODES = ("graph", "stored", "recomputed")
BASELINES = (PLAIN, CHECKPOINT, GUIDE)
SPREAD = 5.0  # of the predictions, standard deviation; in kT, about 3 kcal/mol
SHARPNESS = 1000.0
SEED = 0
POCKET_ATOMS = 150

Step = Callable[[], object]
# The pose model, the poses, and what makes a batch of them, if the model wants one.
Model = tuple[torch.nn.Module, list[Any], Callable[[list[Any]], Any] | None]


@dataclass(frozen=True)
class Case:
    """One training step.

    Attributes
    ----------
    n_poses : of all compounds together
    n_parameters : of the pose model, about
    weights : ``"dense"`` (the mean), ``"sharp"`` (the minimum, t = 1000), or ``"attention"``
        (:class:`GatedAttention`)
    pose_model : a key of :data:`POSE_MODELS`; ``"molecules"`` has its own numbers of atoms and
        parameters, and ``"docking"`` also has a pocket for each compound
    n_tensors : number of tensors that hold the parameters of ``"vector"``
    n_columns : numbers that ``"pairs"`` predicts for each pose: an embedding for ``"attention"``,
        and else tasks
    """

    n_poses: int
    n_atoms: int = 20
    n_parameters: int = 100_000
    weights: str = "dense"
    n_compounds: int = 1
    pose_model: str = "pairs"
    n_tensors: int = 4
    n_columns: int = 1

    def __str__(self) -> str:
        compounds = f"{self.n_compounds} × " if self.n_compounds > 1 else ""
        docked = "docked " if self.pose_model == "docking" else ""
        poses = f"{compounds}{self.n_poses // self.n_compounds} {docked}poses"
        if self.pose_model == "molecules":
            return f"{poses} × 10 to 15 atoms, {self.weights}"
        of_atoms = "" if self.pose_model == "vector" else f" × {self.n_atoms} atoms"
        columns = f", k = {self.n_columns}" if self.n_columns > 1 else ""
        return f"{poses}{of_atoms}, {self.millions}{columns}, {self.weights}"

    @property
    def millions(self) -> str:
        """The number of parameters, as text."""
        return f"P = {self.n_parameters / 1e6:g} M"

    @property
    def n_bytes(self) -> int:
        """Bytes of the parameters."""
        return 4 * self.n_parameters

    @property
    def sizes(self) -> list[int]:
        """Poses of each compound."""
        return [self.n_poses // self.n_compounds] * self.n_compounds


class PairEmbedding(torch.nn.Module):
    """A small SchNet over all pairs of atoms. The pairs take most of the graph."""

    width, n_gaussians, n_interactions = 64, 50, 3

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(20, self.width)
        self.interactions = torch.nn.ModuleList(
            Interaction(self.width, self.n_gaussians) for _ in range(self.n_interactions)
        )
        self.register_buffer("centres", torch.linspace(0.0, 12.0, self.n_gaussians))

    def forward(self, pose: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean over atoms, shape (width,)."""
        types, positions = pose
        source, target = torch.ones(len(types), len(types)).fill_diagonal_(0).nonzero().t()
        distances = (positions[source] - positions[target]).norm(dim=-1)
        distances = distances.clamp(max=12.0)
        # Wide, for none to be denormal: arithmetic on such numbers takes several times as long, and
        # would be most of what is measured.
        gaussians = torch.exp(-0.2 * (distances[:, None] - self.centres).square())
        cutoff = 0.5 * (torch.cos(distances * math.pi / 12.0) + 1.0)
        atoms = self.embedding(types)
        for interaction in self.interactions:
            atoms = atoms + interaction(atoms, source, target, gaussians, cutoff)
        return atoms.mean(dim=0)


class PairNetwork(PairEmbedding):
    """The embedding, and a readout whose width sets the parameters. The readout has most of them.

    In a pocket, the embedding is multiplied with that of the pocket.
    """

    def __init__(self, n_parameters: int, n_columns: int = 1) -> None:
        super().__init__()
        left = n_parameters - sum(p.numel() for p in self.parameters())
        self.readout = readout(self.width, left, n_columns)

    def forward(self, pose: tuple[Tensor, Tensor], pocket: Tensor | None = None) -> Tensor:
        """Return the prediction of one pose, shape (n_columns,)."""
        embedded = super().forward(pose)
        return self.readout(embedded if pocket is None else embedded * pocket)


class Interaction(torch.nn.Module):
    """Continuous-filter convolution: messages over all pairs, weighted by filters of distance."""

    def __init__(self, width: int, n_gaussians: int) -> None:
        super().__init__()
        self.filters = torch.nn.Sequential(
            torch.nn.Linear(n_gaussians, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
        )
        self.before = torch.nn.Linear(width, width, bias=False)
        self.after = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.SiLU())

    def forward(
        self, atoms: Tensor, source: Tensor, target: Tensor, gaussians: Tensor, cutoff: Tensor
    ) -> Tensor:
        """Return the change of each atom's vector."""
        filters = self.filters(gaussians) * cutoff[:, None]
        messages = torch.nn.functional.silu(self.before(atoms)[source] * filters)
        return self.after(torch.zeros_like(atoms).index_add(0, target, messages))


def readout(width: int, n_parameters: int, n_columns: int) -> torch.nn.Sequential:
    """Return an MLP from ``width`` numbers to others, with about ``n_parameters`` parameters."""
    ends = width + 2 + n_columns
    hidden = max(1, round((math.sqrt(ends**2 + 4 * n_parameters) - ends) / 2))
    return torch.nn.Sequential(
        torch.nn.Linear(width, hidden),
        torch.nn.SiLU(),
        torch.nn.Linear(hidden, hidden),
        torch.nn.SiLU(),
        torch.nn.Linear(hidden, n_columns),
    )


def pairs(case: Case) -> Model:
    """Return a network over pairs, and random poses."""
    poses = [random_atoms(case.n_atoms) for _ in range(case.n_poses)]
    return PairNetwork(case.n_parameters, case.n_columns), poses, None


def random_atoms(n_atoms: int) -> tuple[Tensor, Tensor]:
    """Return types and positions of atoms at about the density of a molecule."""
    edge = 2.5 * n_atoms ** (1 / 3)
    return torch.randint(20, (n_atoms,)), edge * torch.rand(n_atoms, 3)


def vector(case: Case) -> Model:
    """Return an MLP of ``n_tensors`` weights and biases, and poses of 8 numbers each."""
    n_hidden = case.n_tensors // 2 - 2
    between = math.isqrt(max(1, case.n_parameters // max(1, n_hidden)))
    width = max(4, between) if n_hidden else max(4, case.n_parameters // 10)
    hidden = [Residual(width, width) for _ in range(n_hidden)]
    layers = [torch.nn.Linear(8, width), torch.nn.SiLU(), *hidden, torch.nn.Linear(width, 1)]
    return torch.nn.Sequential(*layers), list(torch.randn(case.n_poses, 8)), None


class Residual(torch.nn.Linear):
    """A layer that adds to its input, so that twenty of them still tell poses apart."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x + silu(W x + b)."""
        return x + torch.nn.functional.silu(super().forward(x))


def molecules(case: Case) -> Model:
    """Return PyG's SchNet, and conformers of small molecules with 10 or 15 atoms."""
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import SchNet

    poses = []
    for size in case.sizes:
        types = torch.randint(1, 9, (int(torch.randint(10, 16, ())),))
        pairs = (~torch.eye(len(types), dtype=torch.bool)).nonzero().t().contiguous()
        poses += [
            Data(z=types, pos=2 * torch.randn(len(types), 3), edge_index=pairs) for _ in range(size)
        ]
    # Few Gaussians, which are wide: see PairNetwork.
    given = GivenPairs()
    schnet = SchNet(64, 64, num_interactions=3, num_gaussians=10, interaction_graph=given)
    return OfBatch(schnet, given), poses, Batch.from_data_list


class OfBatch(torch.nn.Module):
    """PyG's SchNet as a pose model: one number for each graph of a batch, shape (n_poses, 1)."""

    def __init__(self, schnet: torch.nn.Module, given: GivenPairs) -> None:
        super().__init__()
        self.schnet, self.given = schnet, given

    def forward(self, batch: Any) -> Tensor:
        """Return the predictions."""
        self.given.edges = batch.edge_index
        return self.schnet(batch.z, batch.pos, batch.batch)


class GivenPairs(torch.nn.Module):
    """Neighbour pairs that are stored with the molecules, as in a data set."""

    edges: Tensor

    def forward(self, pos: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pairs and their distances."""
        first, second = self.edges
        return self.edges, (pos[first] - pos[second]).norm(dim=-1)


POSE_MODELS = {"pairs": pairs, "vector": vector, "molecules": molecules, "docking": pairs}


class Setup:
    """The model and poses of a case, the same in every process.

    Attributes
    ----------
    n_weights : number of nonzero weights
    shared, pockets : the embedding of pockets, and a pocket for each compound; None and an empty
        list without pockets
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(SEED)
        self.case = case
        self.pose_model, self.poses, self.collate = POSE_MODELS[case.pose_model](case)
        docks = case.pose_model == "docking"
        self.shared = PairEmbedding() if docks else None
        self.pockets = [random_atoms(POCKET_ATOMS) for _ in case.sizes if docks]
        self.rule = rule(case)
        self.has_tasks = case.n_columns > 1 and case.weights != "attention"
        predictions = self._widen()
        weights = [self._pose_weights(part) for part in predictions.split(case.sizes)]
        self.n_weights = int((torch.cat(weights) != 0).reshape(case.n_poses, -1).any(dim=1).sum())
        modules = torch.nn.ModuleList(filter(None, (self.pose_model, self.shared, self.rule)))
        self.params = [p for p in modules.parameters() if p.requires_grad]

    @torch.no_grad()
    def _widen(self) -> Tensor:
        """Scale the last layer, because the predictions of a new network are nearly equal."""
        predictions = self._all(self.poses, self.case.sizes, self.pockets, self._predict)
        if len(predictions) == 1:
            return predictions
        *_, last = (m for m in self.pose_model.modules() if isinstance(m, torch.nn.Linear))
        # Embeddings go to tanh and sigmoid, which SPREAD would saturate.
        spread = 1.0 if self.case.weights == "attention" else SPREAD
        factor = spread / predictions.std()
        last.weight.mul_(factor)
        last.bias.zero_()
        return predictions * factor

    def _pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the weights of a compound's poses, in the shape of its predictions."""
        if self.has_tasks:
            return torch.stack(list(map(self.rule.pose_weights, predictions.unbind(1))), dim=1)
        return self.rule.pose_weights(predictions)

    def to(self, dtype: torch.dtype) -> None:
        """Convert the parameters and the positions of ``"pairs"``."""
        self.pose_model.to(dtype)
        self.rule.to(dtype)
        self.poses = [(types, positions.to(dtype)) for types, positions in self.poses]

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        for param in self.params:
            param.grad = None

    def steps(self, poses: Sequence[Any] | None = None) -> dict[str, Step]:
        """Return a step for every way; all but the last ones give the same gradients.

        With pockets, there are only plain autograd and the modes.

        Parameters
        ----------
        poses : poses of one compound, used instead of those of the case
        """
        sizes = self.case.sizes if poses is None else [len(poses)]
        # A small step must have a small pocket, too, and any pose will do.
        pockets = self.pockets if poses is None else list(poses)[: len(self.pockets) and 1]
        poses = self.poses if poses is None else list(poses)
        steps: dict[str, Step] = {
            PLAIN: lambda: self._plain(poses, sizes, pockets, self._predict),
            ONE_BATCH: lambda: self._one_batch(poses, sizes),
            CHECKPOINT: lambda: self._plain(poses, sizes, pockets, self._checkpointed),
            GUIDE: lambda: self._guide(poses, sizes),
        }
        ways = {mode: {"gradients": mode, "collate": self.collate} for mode in MODES}
        if self.collate:
            ways[CHUNKED] = {**ways["graph"], "chunk_size": CHUNK_SIZE}
        given = {"shared_inputs": pockets} if self.shared else {}
        for way, options in ways.items():
            model = self.model(**options)
            steps[way] = partial(self._step, model, poses, sizes, **given)
        if self.shared:
            return {way: steps[way] for way in (PLAIN, *MODES)}
        return steps | {
            BARE: lambda: self._bare(poses),
            FORWARD: lambda: self._forward(poses),
            BUILT: lambda: self._built(poses),
            COPY: self._copy,
        }

    def model(self, **options: Any) -> MultiPoseModel:
        """Return a multi-pose model of the case."""
        # Earlier versions of mtenn_core have no shared part.
        if self.shared:
            options["shared"] = self.shared
        if self.has_tasks:  # nor have they tasks
            options["tasks"] = self.case.n_columns
        return MultiPoseModel(self.pose_model, self.rule, **options)

    def _step(self, model: MultiPoseModel, *arguments: Any, **given: Any) -> Tensor:
        loss = model(*arguments, **given).prediction.sum()
        loss.backward()
        return loss.detach()

    def _predict(self, pose: Any, *pocket: Tensor) -> Tensor:
        """Return the prediction of one pose, shape (1,) or (1, n_columns)."""
        prediction = self.pose_model(self.collate([pose]) if self.collate else pose, *pocket)
        return prediction.reshape((1, -1) if self.case.n_columns > 1 else 1)

    def _checkpointed(self, pose: Any) -> Tensor:
        return checkpoint(self._predict, pose, use_reentrant=False)

    def _all(
        self,
        poses: list[Any],
        sizes: list[int],
        pockets: list[Any],
        predict: Callable[..., Tensor],
    ) -> Tensor:
        """Return the predictions, a row for each pose. Each pocket is embedded once."""
        if not self.shared:
            return torch.cat([predict(pose) for pose in poses])
        embedded = [self.shared(pocket) for pocket in pockets]
        of_poses = [pocket for pocket, n in zip(embedded, sizes, strict=True) for _ in range(n)]
        return torch.cat(list(map(predict, poses, of_poses)))

    def _plain(
        self,
        poses: list[Any],
        sizes: list[int],
        pockets: list[Any],
        predict: Callable[..., Tensor],
    ) -> Tensor:
        return self._combine(self._all(poses, sizes, pockets, predict), sizes)

    def _one_batch(self, poses: list[Any], sizes: list[int]) -> None:
        self._combine(self.pose_model(self.collate(poses)).reshape(-1), sizes)

    def _combine(self, predictions: Tensor, sizes: list[int]) -> Tensor:
        """Take the gradients of the sum of all combined predictions. Return the sum."""
        columns = predictions.unbind(1) if self.has_tasks else (predictions,)
        parts = [part for column in columns for part in column.split(sizes)]
        loss = torch.stack(list(map(self.rule.combine, parts))).sum()
        loss.backward()
        return loss.detach()

    def _guide(self, poses: list[Any], sizes: list[int]) -> None:
        """Store a gradient for each pose, and combine them as the guide does.

        Its smooth maximum of n·t·ŷ, divided by n·t, is the minimum or, for a small t, the mean.
        """
        scale = -SHARPNESS if self.case.weights == "sharp" else 1e-6
        names = [name for name, _ in self.pose_model.named_parameters()]
        start = 0
        for size in sizes:
            grad_dict: dict[str, list[Tensor]] = {name: [] for name in names}
            pred_list = []
            for pose in poses[start : start + size]:
                prediction = scale * self._predict(pose).reshape(())
                for name, gradient in zip(
                    names, torch.autograd.grad(prediction, self.params), strict=True
                ):
                    grad_dict[name].append(gradient)
                pred_list.append(prediction.detach())
            (GuideCombination()(pred_list, grad_dict, names, *self.params) / scale).backward()
            start += size

    def _bare(self, poses: list[Any]) -> None:
        for pose in poses:
            torch.autograd.grad(self._predict(pose), self.params)

    @torch.no_grad()
    def _forward(self, poses: list[Any]) -> None:
        self._built(poses)

    def _built(self, poses: list[Any]) -> None:
        for pose in poses:
            self._predict(pose)

    def _copy(self) -> None:
        # As one tensor: what a call takes for each parameter tensor is not what a copy is.
        if not hasattr(self, "_copies"):
            flat = torch.cat([p.detach().flatten() for p in self.params])
            self._copies = flat, flat.clone()
        self._copies[1].copy_(self._copies[0])

    def graph_bytes(self) -> int:
        """Return the bytes that one pose's graph keeps alive, without parameters and the pose."""
        known = {t.untyped_storage().data_ptr() for t in self.params}
        known |= {t.untyped_storage().data_ptr() for t in self.poses[0] if isinstance(t, Tensor)}
        found: dict[int, int] = {}
        kept = []

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)  # so that no other takes its place
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            self._predict(self.poses[0])
        return sum(found.values())


class GatedAttention(Combination):
    """Gated attention over embeddings, and one number from the pooled embedding.

    See M. Ilse, J. M. Tomczak and M. Welling, Attention-based Deep Multiple Instance Learning
    (2018), arXiv 1802.04712.
    """

    examples = ({"n_columns": 3},)

    def __init__(self, n_columns: int, n_hidden: int = 32) -> None:
        super().__init__()
        self.pose_columns = n_columns
        self.content = torch.nn.Linear(n_columns, n_hidden)
        self.gate = torch.nn.Linear(n_columns, n_hidden)
        self.score = torch.nn.Linear(n_hidden, 1, bias=False)
        self.readout = torch.nn.Linear(n_columns, 1)

    def scores(self, predictions: Tensor) -> Tensor:
        """Return a score for each pose, shape (..., n_poses, 1)."""
        gated = torch.tanh(self.content(predictions)) * torch.sigmoid(self.gate(predictions))
        return self.score(gated)

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the number for one compound, shape ()."""
        attention = torch.softmax(self.scores(predictions), dim=0)
        return self.readout((attention * predictions).sum(dim=0)).squeeze(-1)


def rule(case: Case) -> Combination:
    """Return the mean, a minimum that is practically hard, or gated attention."""
    if case.weights == "attention":
        return GatedAttention(case.n_columns)
    if case.weights == "dense":
        return registry.create("mean")
    return registry.create("min", pred_scale=SHARPNESS)
