"""A part that all poses of a compound share, compared with plain autograd."""

import copy
import gc
import io
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mtenn_core import Combination, MultiPoseModel
from mtenn_core._engine.autograd_nodes import operations
from mtenn_core._engine.estimate import NODE
from mtenn_core._engine.mode_table import MODES
from mtenn_core.errors import (
    ChangedBeforeBackwardError,
    DoubleBackwardError,
    GradientError,
    PredictionError,
)
from mtenn_core.model import MultiPoseOutput

# Gradients are sums of a few hundred float64 products, in another order in each mode: 1e-14. The
# sharp weights multiply rounding errors of the predictions by 1e4.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SIZES = [3, 1, 4]
ALL_MODES = pytest.mark.parametrize("gradients", MODES)


class Minimum(Combination):
    """A soft minimum whose scale trains. With scale 1e4, most weights are zero."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def combine(self, predictions: Tensor) -> Tensor:
        return -torch.logsumexp(-self.scale * predictions, dim=0) / self.scale


class FullDepth(Combination):
    """A mean with its own ``forward``. It records the gradients that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, list[Tensor]]] = []

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        self.calls.append(grad_dict)
        return Mean()(pred_list, grad_dict, param_names, *model_params)


class Mean(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mean()


class Receptor(nn.Module):
    """Embeds each atom of a pocket, shape (n_atoms, 3), in 5 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.atoms, self.embedding = nn.Linear(3, 6).double(), nn.Linear(6, 5).double()

    def forward(self, pocket: Tensor) -> Tensor:
        return self.embedding(torch.tanh(self.atoms(pocket)))


class Docking(nn.Module):
    """Scores a ligand, shape (4, 3), or a batch of ligands, in an embedded pocket."""

    def __init__(self) -> None:
        super().__init__()
        self.ligand, self.readout = nn.Linear(3, 5).double(), nn.Linear(5, 1).double()

    def forward(self, ligand: Tensor, pocket: Tensor | list[Tensor]) -> Tensor:
        if isinstance(pocket, list):
            pocket = torch.stack([of_pose.mean(0) for of_pose in pocket])[:, None]
        else:
            pocket = pocket.mean(0)
        return self.readout(torch.tanh(self.ligand(ligand)) * pocket).sum((-2, -1))


def new_pockets(n_compounds: int = len(SIZES)) -> list[Tensor]:
    return [torch.randn(5 + compound, 3, dtype=torch.float64) for compound in range(n_compounds)]


def new_poses(n_poses: int = sum(SIZES)) -> Tensor:
    return torch.randn(n_poses, 4, 3, dtype=torch.float64)


def new_model(
    gradients: str,
    combination: Combination | None = None,
    *,
    pose_model: nn.Module | None = None,
    shared: nn.Module | None = None,
    **options: Any,
) -> MultiPoseModel:
    if gradients == "stored":
        options.pop("chunk_size", None)
    return MultiPoseModel(
        pose_model or Docking(),
        combination or Minimum(),
        shared=shared or Receptor(),
        gradients=gradients,
        **options,
    )


def plain(model, poses, sizes, pockets) -> MultiPoseOutput:
    """Return the output by plain autograd: each pocket is embedded once."""
    embedded = [model.shared(pocket) for pocket in pockets]
    of_poses = [out for out, size in zip(embedded, sizes, strict=True) for _ in range(size)]
    runs = zip(poses, of_poses, strict=True)
    predictions = torch.cat([model.pose_model(*run).reshape(1) for run in runs])
    combined = [model.combination.combine(part) for part in predictions.split(sizes)]
    return MultiPoseOutput(torch.stack(combined), predictions)


def loss_of(out: MultiPoseOutput) -> Tensor:
    return out.prediction.square().sum() + out.pose_predictions.sin().sum()


LOSSES = {
    "combined": lambda out: out.prediction.square().sum(),
    "poses": lambda out: out.pose_predictions.sin().sum(),
    "both": loss_of,
}


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: param.grad for name, param in model.named_parameters()}


def assert_same(found, expected, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(
                found[name],
                gradient,
                **(tolerance or CLOSE),
                msg=lambda text, name=name: f"{name}: {text}",
            )


def expected_gradients(model, poses, sizes, pockets, loss=loss_of):
    """Return the gradients of plain autograd. Leave the model as it is."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss(plain(model, poses, sizes, pockets)).backward()
    return gradients_of(model)


def assert_like_plain(model, loss=loss_of, sizes=SIZES, **options) -> None:
    poses, pockets = new_poses(sum(sizes)), new_pockets(len(sizes))
    expected = expected_gradients(model, poses, sizes, pockets, loss)
    loss(model(poses, sizes, shared_inputs=pockets, **options)).backward()
    assert_same(gradients_of(model), expected)


# Gradients


LAYOUTS = {
    "single": {},
    "chunks of 1": {"collate": torch.stack, "chunk_size": 1},
    "chunks of 2": {"collate": torch.stack, "chunk_size": 2},  # poses 2 and 3: two compounds
    "one chunk": {"collate": torch.stack, "chunk_size": 100},
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sizes", [[4], SIZES], ids=["one compound", "three compounds"])
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["dense", "sharp"])
@ALL_MODES
def test_gradients_equal_plain_autograd(gradients, scale, sizes, layout, loss):
    assert_like_plain(new_model(gradients, Minimum(scale), **layout), loss, sizes)


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_a_batch_of_poses_gets_one_output_per_pose(gradients):
    assert_like_plain(new_model(gradients), collated=True)


def test_a_batch_of_poses_cannot_be_stored():
    with pytest.raises(ValueError, match="runs pose by pose and does not take one batch"):
        new_model("stored")(new_poses(), SIZES, shared_inputs=new_pockets(), collated=True)


def test_a_combination_of_full_depth_trains_the_shared_part():
    combination = FullDepth()
    model = new_model("stored", combination)
    poses, pockets = new_poses(), new_pockets()
    reference = copy.deepcopy(model)
    reference.combination = Mean()
    expected = expected_gradients(reference, poses, SIZES, pockets)
    loss_of(model(poses, SIZES, shared_inputs=pockets)).backward()
    assert_same(gradients_of(model), expected)
    own = set(dict(model.pose_model.named_parameters()))
    for grad_dict, size, pocket in zip(combination.calls, SIZES, pockets, strict=True):
        assert grad_dict.keys() - own == {"shared output 0"}
        shapes = [gradient.shape for gradient in grad_dict["shared output 0"]]
        assert shapes == [(len(pocket), 5)] * size


class Pocket(NamedTuple):
    atoms: Tensor
    frozen: Tensor
    name: str


class Outputs(OrderedDict[str, Any]):
    """A dict whose entries are also attributes, as Hugging Face's models return it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


# For each kind of output: make it of a trained and a frozen tensor, and read both again.
OUTPUTS = {
    "tensor": (lambda e, f: e, lambda out: (out, out)),
    "tuple": (lambda e, f: (e, 3, f), lambda out: (out[0], out[2])),
    "list": (lambda e, f: [e, None, f], lambda out: (out[0], out[2])),
    "dict": (lambda e, f: {"e": e, 3: f}, lambda out: (out["e"], out[3])),
    "named tuple": (lambda e, f: Pocket(e, f, "A"), lambda out: (out.atoms, out.frozen)),
    "ordered dict": (lambda e, f: OrderedDict(e=e, f=f), lambda out: tuple(out.values())),
    "subclass of dict": (lambda e, f: Outputs(e=e, f=f), lambda out: (out.e, out.f)),
    "nested": (
        lambda e, f: {"A": [(e, "name"), {"f": f, "n": 3}], "B": None},
        lambda out: (out["A"][0][0], out["A"][1]["f"]),
    ),
    "two trained": (lambda e, f: (e, e.sin() * f), lambda out: out),
    "one twice": (lambda e, f: (e, [e]), lambda out: (out[0], out[1][0])),
    "a view": (lambda e, f: (e, e[1:]), lambda out: (out[0], out[1].sum(0))),
    "max of torch": (lambda e, f: e.max(dim=0), lambda out: (out.values, out.indices)),
    "size": (lambda e, f: (e, e.shape), lambda out: (out[0], out[1].numel())),
}


class Making(nn.Module):
    """A receptor that returns an output of some kind."""

    def __init__(self, make) -> None:
        super().__init__()
        self.receptor, self.make = Receptor(), make
        self.register_buffer("frozen", torch.randn(5, dtype=torch.float64))

    def forward(self, pocket):
        return self.make(self.receptor(pocket), self.frozen)


class Reading(nn.Module):
    """A pose model that reads an output of some kind."""

    def __init__(self, read) -> None:
        super().__init__()
        self.docking, self.read = Docking(), read

    def forward(self, ligand, out):
        first, second = self.read(out)
        return self.docking(ligand, first * second)


@pytest.mark.parametrize("kind", OUTPUTS)
@ALL_MODES
def test_the_output_may_be_tensors_in_tuples_lists_and_dicts(gradients, kind):
    make, read = OUTPUTS[kind]
    assert_like_plain(new_model(gradients, pose_model=Reading(read), shared=Making(make)))


@dataclass
class Own:
    atoms: Tensor


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_the_output_may_be_an_own_object(gradients):
    model = new_model(
        gradients,
        pose_model=Reading(lambda out: (out.atoms, 1)),
        shared=Making(lambda e, f: Own(e)),
    )
    assert_like_plain(model)


@pytest.mark.parametrize("wrap", [lambda own: own, lambda own: (1, [own])], ids=["own", "nested"])
def test_stored_refuses_tensors_with_a_graph_in_an_own_object(wrap):
    model = new_model("stored", shared=Making(lambda e, f: wrap(Own(e))))
    with pytest.raises(
        GradientError,
        match=r"'stored' finds .* only in tuples, lists and dicts;.*"
        r" gradients='recomputed' or 'graph'",
    ):
        model(new_poses(), SIZES, shared_inputs=new_pockets())


def test_stored_takes_an_own_object_without_a_graph():
    model = new_model(
        "stored",
        pose_model=Reading(lambda out: (out.atoms, 1)),
        shared=Making(lambda e, f: Own(e)).requires_grad_(False),
    )
    assert_like_plain(model)


@ALL_MODES
def test_a_frozen_shared_part_gets_no_gradient(gradients):
    model = new_model(gradients, shared=Receptor().requires_grad_(False))
    assert_like_plain(model)
    assert all(param.grad is None for param in model.shared.parameters())


class Table(nn.Module):
    """One trained embedding for all pockets: the output is a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(2, 5, dtype=torch.float64))

    def forward(self, pocket):
        return self.embedding


@ALL_MODES
def test_the_output_may_be_a_parameter_itself(gradients):
    assert_like_plain(new_model(gradients, shared=Table()))


class Reuse(nn.Module):
    """A pose model that uses the receptor as a submodule, too."""

    def __init__(self, receptor: nn.Module) -> None:
        super().__init__()
        self.docking, self.receptor = Docking(), receptor

    def forward(self, ligand, pocket):
        return self.docking(ligand, pocket) + self.receptor(ligand).sum()


@ALL_MODES
def test_the_pose_model_may_use_the_shared_part_too(gradients):
    receptor = Receptor()
    assert_like_plain(new_model(gradients, pose_model=Reuse(receptor), shared=receptor))


class Ignoring(Docking):
    """Uses its pocket only for ligands that lie far to one side."""

    def forward(self, ligand, pocket):
        ones = torch.ones(1, 5, dtype=torch.float64)
        return super().forward(ligand, pocket if ligand.sum() > 0 else ones)


@ALL_MODES
def test_poses_may_ignore_the_output(gradients):
    assert_like_plain(new_model(gradients, pose_model=Ignoring()))


@ALL_MODES
def test_pockets_that_require_grad_get_it(gradients):
    model, poses = new_model(gradients), new_poses()
    one = [pocket.requires_grad_() for pocket in new_pockets()]
    other = [pocket.detach().clone().requires_grad_() for pocket in one]
    loss_of(plain(model, poses, SIZES, one)).backward()
    loss_of(model(poses, SIZES, shared_inputs=other)).backward()
    assert_same(
        {str(i): pocket.grad for i, pocket in enumerate(other)},
        {str(i): pocket.grad for i, pocket in enumerate(one)},
    )


@ALL_MODES
def test_a_compound_without_weight_gives_the_shared_part_zeros(gradients):
    model = new_model(gradients, shared=Tables())
    model(new_poses(5), [2, 3], shared_inputs=[0, 1]).prediction[1].backward()
    zero, other = model.shared.tables
    assert zero.grad.tolist() == torch.zeros(2, 5).tolist()
    assert other.grad.abs().sum() > 0


class Tables(nn.Module):
    """Embeds pocket number i in a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        tables = torch.randn(2, 2, 5, dtype=torch.float64)
        self.tables = nn.ParameterList(nn.Parameter(table) for table in tables)

    def forward(self, pocket: int) -> Tensor:
        return self.tables[pocket] * 2


# The compiler itself hides this warning, but not from a filter that makes it an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@ALL_MODES
def test_both_parts_may_be_compiled(gradients):
    model = new_model(gradients)
    poses, pockets = new_poses(), torch.randn(3, 5, 3, dtype=torch.float64).unbind()
    expected = expected_gradients(model, poses, SIZES, pockets)
    params = dict(model.named_parameters())
    model.pose_model = torch.compile(model.pose_model, backend="aot_eager")
    model.shared = torch.compile(model.shared, backend="aot_eager")
    loss_of(model(poses, SIZES, shared_inputs=pockets)).backward()
    assert_same({name: param.grad for name, param in params.items()}, expected)


class KeepingReceptor(Receptor):
    """Keeps a part of its graph, for a penalty."""

    def forward(self, pocket):
        self.kept = super().forward(pocket)
        return self.kept


class KeepingDocking(Docking):
    """Keeps a tensor that it computes from the output of the shared part, for a penalty."""

    def forward(self, ligand, pocket):
        self.kept = pocket.square()
        return super().forward(ligand, pocket)


def by_backward(loss, params):
    loss.backward()


def by_inputs(loss, params):
    loss.backward(inputs=params)


def by_grad(loss, params):
    for param, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
        param.grad = gradient


def outcome_with_penalty(model, part: str, differentiate=by_backward):
    """Return the gradients of a loss with a penalty, and those of plain autograd."""
    poses, pockets = new_poses(), new_pockets()
    reference = copy.deepcopy(model)
    loss = loss_of(plain(reference, poses, SIZES, pockets))
    (loss + reference.get_submodule(part).kept.square().sum()).backward()
    loss = loss_of(model(poses, SIZES, shared_inputs=pockets))
    loss = loss + model.get_submodule(part).kept.square().sum()
    differentiate(loss, list(model.parameters()))
    return gradients_of(model), gradients_of(reference)


@ALL_MODES
def test_a_penalty_on_the_output_of_the_shared_part_is_right(gradients):
    model = new_model(gradients, shared=KeepingReceptor())
    assert_same(*outcome_with_penalty(model, "shared"))


@pytest.mark.parametrize("differentiate", [by_backward, by_inputs, by_grad])
@ALL_MODES
def test_a_penalty_of_the_pose_model_on_the_output_is_right(gradients, differentiate):
    model = new_model(gradients, pose_model=KeepingDocking())
    assert_same(*outcome_with_penalty(model, "pose_model", differentiate))


@ALL_MODES
def test_hooks_on_parameters_run_once_and_see_the_sum_over_poses(gradients):
    model, poses, pockets = new_model(gradients), new_poses(), new_pockets()
    expected, seen = expected_gradients(model, poses, SIZES, pockets), {}
    for name, param in model.named_parameters():
        param.register_hook(lambda gradient, name=name: seen.setdefault(name, []).append(gradient))
    loss_of(model(poses, SIZES, shared_inputs=pockets)).backward()
    assert {len(found) for found in seen.values()} == {1}
    assert_same({name: found[0] for name, found in seen.items()}, expected)


@ALL_MODES
def test_parameters_may_be_those_of_a_functional_call(gradients):
    model, poses, pockets = new_model(gradients), new_poses(), new_pockets()
    halves = {n: (p.detach() / 2).requires_grad_() for n, p in model.named_parameters()}
    given = {name: 2 * half for name, half in halves.items()}
    out = torch.func.functional_call(model, given, (poses, SIZES), {"shared_inputs": pockets})
    loss_of(out).backward()
    expected = expected_gradients(model, poses, SIZES, pockets)
    assert_same({name: half.grad / 2 for name, half in halves.items()}, expected)


@ALL_MODES
def test_a_retained_graph_survives_further_steps(gradients):
    """In stored, those steps look for memory to use again."""
    model, poses, pockets = new_model(gradients), new_poses(), new_pockets()
    expected = expected_gradients(model, poses, SIZES, pockets)
    loss = loss_of(model(poses, SIZES, shared_inputs=pockets))
    loss.backward(retain_graph=True)
    for _ in range(2):
        loss_of(model(2 * poses, SIZES, shared_inputs=pockets)).backward()
    model.zero_grad()
    loss.backward()
    assert_same(gradients_of(model), expected)


class Sine(torch.autograd.Function):
    """A Function in Python. It computes something in backward even without a gradient."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.save_for_backward(hidden)
        return hidden.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


def test_a_function_in_the_shared_part_does_not_make_poses_without_weight_run_again():
    class Custom(Receptor):
        def forward(self, pocket):
            return Sine.apply(super().forward(pocket))

    model, runs = new_model("recomputed", Minimum(1e5), shared=Custom()), []
    hook = model.pose_model.register_forward_hook(lambda *_: runs.append(1))
    prediction = model(new_poses(), SIZES, shared_inputs=new_pockets()).prediction
    assert len(runs) == sum(SIZES)
    prediction.sum().backward()
    assert len(runs) == sum(SIZES) + len(SIZES)  # the pose with weight of each compound
    hook.remove()
    model.zero_grad()
    assert_like_plain(model)


# The number of runs, and the state


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["dense", "sharp"])
@ALL_MODES
def test_the_shared_part_runs_once_per_compound_and_never_in_backward(gradients, scale):
    model, runs = new_model(gradients, Minimum(scale)), []
    model.shared.register_forward_hook(lambda module, given, out: runs.append(given[0]))
    pockets = new_pockets()
    out = model(new_poses(), SIZES, shared_inputs=pockets)
    assert list(map(id, runs)) == list(map(id, pockets))
    loss_of(out).backward()
    assert len(runs) == len(SIZES)


@ALL_MODES
def test_without_grad_the_shared_part_predicts(gradients):
    model, poses, pockets = new_model(gradients), new_poses(), new_pockets()
    expected = plain(model, poses, SIZES, pockets)
    for no_grad in (torch.no_grad(), torch.inference_mode()):
        with no_grad:
            out = model(poses, SIZES, shared_inputs=pockets)
        assert not out.prediction.requires_grad
        torch.testing.assert_close(out.prediction, expected.prediction, **CLOSE)


@ALL_MODES
def test_dropout_in_both_parts_is_that_of_plain_autograd(gradients):
    pose_model = Docking()
    pose_model.readout = nn.Sequential(nn.Dropout(0.5), pose_model.readout)
    receptor = nn.Sequential(Receptor(), nn.Dropout(0.5))
    model = new_model(gradients, pose_model=pose_model, shared=receptor)
    poses, pockets = new_poses(), new_pockets()
    torch.manual_seed(1)
    expected = expected_gradients(model, poses, SIZES, pockets)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    loss_of(model(poses, SIZES, shared_inputs=pockets)).backward()
    assert torch.equal(torch.rand(1), drawn)
    assert_same(gradients_of(model), expected)


@ALL_MODES
def test_batch_norm_in_the_shared_part_is_updated_once(gradients):
    model = new_model(gradients, shared=nn.Sequential(Receptor(), nn.BatchNorm1d(5).double()))
    poses, pockets = new_poses(), new_pockets()
    reference = copy.deepcopy(model)
    loss_of(plain(reference, poses, SIZES, pockets)).backward()
    loss_of(model(poses, SIZES, shared_inputs=pockets)).backward()
    assert_same(gradients_of(model), gradients_of(reference))
    assert model.shared[1].num_batches_tracked == len(SIZES)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=0)


@ALL_MODES
def test_autocast_is_right_for_both_parts(gradients):
    model = new_model(gradients).float()
    poses, pockets = new_poses().float(), [pocket.float() for pocket in new_pockets()]
    expected = expected_gradients(model, poses, SIZES, pockets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(poses, SIZES, shared_inputs=pockets)
    assert out.prediction.dtype == torch.float32
    loss_of(out).backward()
    for name, gradient in gradients_of(model).items():
        # bfloat16 has 8 bits. A gradient goes through some ten operations, and sums of terms of
        # both signs lose a few more bits.
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 32 * torch.finfo(torch.bfloat16).eps, name


@ALL_MODES
def test_gradients_accumulate(gradients):
    model, poses, pockets = new_model(gradients), new_poses(), new_pockets()
    expected = expected_gradients(model, poses, SIZES, pockets)
    for _ in range(2):
        loss_of(model(poses, SIZES, shared_inputs=pockets)).backward()
    assert_same(gradients_of(model), {n: 2 * gradient for n, gradient in expected.items()})


@ALL_MODES
def test_a_retained_graph_has_a_second_backward(gradients):
    model, poses, pockets = new_model(gradients), new_poses(), new_pockets()
    expected = expected_gradients(model, poses, SIZES, pockets)
    loss = loss_of(model(poses, SIZES, shared_inputs=pockets))
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert_same(gradients_of(model), expected)


class ClosedForm(Mean):
    def pose_weights(self, predictions: Tensor) -> Tensor:
        return torch.full_like(predictions, 1 / len(predictions))


def penalty(out: MultiPoseOutput, params) -> Tensor:
    found = torch.autograd.grad(loss_of(out), params, create_graph=True)
    return sum(gradient.square().sum() for gradient in found)


def test_a_penalty_on_gradients_is_right_in_graph():
    model, poses, pockets = new_model("graph"), new_poses(), new_pockets()
    params = [*model.pose_model.parameters(), *model.shared.parameters()]
    expected = torch.autograd.grad(penalty(plain(model, poses, SIZES, pockets), params), params)
    out = model(poses, SIZES, shared_inputs=pockets)
    found = torch.autograd.grad(penalty(out, params), params)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("gradients", "combination"), [("stored", Mean()), ("recomputed", ClosedForm())]
)
def test_a_penalty_on_gradients_is_refused_elsewhere(gradients, combination):
    model = new_model(gradients, combination)
    params = [*model.pose_model.parameters(), *model.shared.parameters()]
    out = model(new_poses(), SIZES, shared_inputs=new_pockets())
    with pytest.raises(DoubleBackwardError, match="Use MultiPoseModel"):
        penalty(out, params)


def test_a_state_dict_has_the_shared_part():
    model, other = new_model("stored"), new_model("recomputed")
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} >= {"shared", "pose_model", "combination"}
    other.load_state_dict(state)
    poses, pockets = new_poses(), new_pockets()
    out, again = (m(poses, SIZES, shared_inputs=pockets) for m in (model, other))
    assert torch.equal(out.prediction, again.prediction)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@ALL_MODES
def test_a_copy_trains_with_its_own_shared_part(gradients, copied):
    model = new_model(gradients)
    loss_of(model(new_poses(), SIZES, shared_inputs=new_pockets())).backward()
    model.zero_grad()
    assert_like_plain(copied(model))
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("layout", ["single", "chunks of 2"])
@ALL_MODES
def test_training_with_a_shared_part_repeats_plain_training(gradients, layout):
    model, poses, pockets = new_model(gradients, **LAYOUTS[layout]), new_poses(), new_pockets()
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (model, reference)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model(poses, SIZES, shared_inputs=pockets)).backward()
        loss_of(plain(reference, poses, SIZES, pockets)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(dict(model.named_parameters()), dict(reference.named_parameters()))


# Memory


def tracked(module: nn.Module) -> tuple[nn.Module, list[int], list[Any]]:
    """Return a module whose output's graph saves a tensor; the graphs alive; weak references."""
    alive: list[int] = []
    graphs: list[Any] = []

    class Tracking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *inputs):
            alive.append(count(graphs))
            hidden = self.inner(*inputs)
            graphs.append(weakref.ref(hidden.untyped_storage()))
            return hidden * hidden

    return Tracking(), alive, graphs


def count(graphs: list[Any]) -> int:
    return sum(graph() is not None for graph in graphs)


@pytest.mark.parametrize("sizes", [[6], [3, 3]], ids=["one compound", "two compounds"])
@pytest.mark.parametrize("gradients", ["stored", "recomputed"])
def test_one_graph_of_a_pose_is_alive_and_one_of_each_compound(gradients, sizes):
    pose_model, alive, graphs = tracked(Docking())
    shared, _, of_shared = tracked(Receptor())
    model = new_model(gradients, pose_model=pose_model, shared=shared)
    out = model(new_poses(6), sizes, shared_inputs=new_pockets(len(sizes)))
    assert count(graphs) == 0
    assert count(of_shared) == len(sizes)
    out.prediction.sum().backward()
    assert max(alive) <= 1  # the pose before, until its variable is bound anew
    assert count(graphs) == 0
    assert count(of_shared) == 0


@ALL_MODES
def test_a_step_leaves_nothing_behind(gradients):
    """Not even for the collector of cycles: it is late, and does not count bytes of tensors."""
    model, poses, pockets = new_model(gradients), new_poses(), new_pockets()
    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            model.zero_grad()
            loss_of(model(poses, SIZES, shared_inputs=pockets)).backward()
            counts.append(len(gc.get_objects()))
    finally:
        gc.enable()
    assert counts[-1] <= counts[-2] + 1  # the entry in this list's own bookkeeping


def test_the_estimate_counts_the_shared_part():
    """The encoder saves its input, and the pose model two vectors: 8 bytes for each number."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(100, 10, bias=False).double()

        def forward(self, pocket):
            return self.layer(pocket)

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10, dtype=torch.float64))

        def forward(self, ligand, pocket):
            return (self.weight * ligand) @ pocket

    ligands = [torch.randn(10, dtype=torch.float64) for _ in range(5)]
    pockets = [torch.randn(100, dtype=torch.float64) for _ in range(2)]
    model = MultiPoseModel(Product(), Mean(), shared=Encoder())
    runs = []
    model.shared.register_forward_hook(lambda *_: runs.append(1))
    found = model.estimate(ligands, [2, 3], shared_inputs=pockets)
    assert len(runs) == 2
    graph = 2 * 80  # the ligand and the weighted ligand; the output belongs to the shared part
    gradient = 8 * (1000 + 10)
    nodes = NODE * len(operations(Product()(ligands[0], ligands[0]).reshape(1)))
    assert {cost.gradients: cost.memory for cost in found.modes} == {
        "graph": 5 * (graph + nodes) + 2 * gradient + 2 * 800,
        "stored": graph + nodes + 5 * (80 + 80) + 2 * gradient + 2 * 800,
        "recomputed": graph + 5 * nodes + 2 * gradient + 2 * 800,
    }


# Errors


@ALL_MODES
@pytest.mark.parametrize("estimates", [False, True], ids=["forward", "estimate"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(None, "each of the 3 compounds; found NoneType", id="none"),
        pytest.param(torch.zeros(3, 5, 3), "3 compounds; found Tensor", id="tensor"),
        pytest.param({0: 1}, "3 compounds; found dict", id="dict"),
        pytest.param([1, 2], "3 compounds; found 2 inputs", id="too few"),
        pytest.param([1, 2, 3, 4], "3 compounds; found 4 inputs", id="too many"),
    ],
)
def test_shared_inputs_that_do_not_fit_are_refused(gradients, estimates, given, message):
    model = new_model(gradients)
    with pytest.raises(PredictionError, match=message):
        (model.estimate if estimates else model)(new_poses(), SIZES, shared_inputs=given)


@ALL_MODES
def test_shared_inputs_without_a_shared_part_are_refused(pose_model, poses, gradients):
    model = MultiPoseModel(pose_model, Mean(), gradients=gradients)
    with pytest.raises(PredictionError, match=r"This model has no such part\. Make it with"):
        model(poses, shared_inputs=[1])


def test_the_shared_part_is_a_module(pose_model):
    with pytest.raises(TypeError, match=r"shared must be a torch\.nn\.Module or None; found"):
        MultiPoseModel(pose_model, Mean(), shared=lambda pocket: pocket)


@ALL_MODES
def test_an_error_of_the_shared_part_has_the_compound_in_a_note(gradients):
    pockets = new_pockets()
    pockets[1] = pockets[1][:, :2]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        new_model(gradients)(new_poses(), SIZES, shared_inputs=pockets)
    assert caught.value.__notes__ == ["raised by the shared part on compound 1"]


@pytest.mark.parametrize("collated", [False, True], ids=["poses", "one batch"])
def test_an_output_that_changes_before_backward_is_an_error_in_recomputed(collated):
    model, outputs = new_model("recomputed"), []
    model.shared.register_forward_hook(lambda module, given, out: outputs.append(out))
    out = model(new_poses(), SIZES, shared_inputs=new_pockets(), collated=collated)
    with torch.no_grad():
        outputs[1].mul_(2)
    with pytest.raises(
        ChangedBeforeBackwardError, match="shared output of compound 1: one of its tensors, shape"
    ):
        loss_of(out).backward()


def test_an_output_that_changes_before_backward_does_no_harm_in_stored():
    model, outputs = new_model("stored"), []
    poses, pockets = new_poses(), new_pockets()
    expected = expected_gradients(model, poses, SIZES, pockets)
    model.shared.register_forward_hook(lambda module, given, out: outputs.append(out))
    out = model(poses, SIZES, shared_inputs=pockets)
    with torch.no_grad():
        outputs[1].mul_(2)
    loss_of(out).backward()
    assert_same(gradients_of(model), expected)
