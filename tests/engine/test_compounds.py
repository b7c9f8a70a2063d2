"""Many compounds in one call: batches give the numbers of a loop, and pose weights stay apart."""

import copy
import math
import random
import sys
import warnings
from typing import ClassVar

import pytest
import torch
from bank.right import RIGHT  # one number for each pose
from packaging.version import Version
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel, effective_poses
from mtenn_core._engine import batchable, compounds, evaluation
from mtenn_core._engine.batchable import attributes_unchanged, batchability
from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.mode_table import MODES
from mtenn_core.errors import CombinationContractError, PredictionError
from mtenn_core.testing._probe.subject import Subject

# Ragged, with one pose among them, equal sizes apart, and one size only once.
SIZES = [3, 1, 5, 3, 1, 2, 5, 3, 1, 5, 8, 2]


class SmoothMinimum(Combination):
    def __init__(self, t=2.0):
        super().__init__()
        self.log_t = torch.nn.Parameter(torch.tensor(math.log(t)))

    def combine(self, predictions: Tensor) -> Tensor:
        t = self.log_t.exp()
        return -torch.logsumexp(-t * predictions, dim=0) / t

    def pose_weights(self, predictions: Tensor) -> Tensor:
        return torch.softmax(-self.log_t.exp() * predictions, dim=0)


class Square(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.square().sum()


class Scored(Combination):
    pose_inputs = ("score",)

    def combine(self, predictions: Tensor, score: Tensor) -> Tensor:
        return (torch.softmax(score, dim=0) * predictions).sum()


class InDomain(torch.nn.Module):
    """A pose model whose predictions lie in the domain of a combination."""

    def __init__(self, domain):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1).double()
        self.low, self.high = domain

    def forward(self, batch: Tensor) -> Tensor:
        numbers = self.linear(batch)[:, 0]
        if math.isfinite(self.low) and math.isfinite(self.high):
            return self.low + (self.high - self.low) * torch.sigmoid(numbers)
        if math.isfinite(self.low):
            return self.low + numbers.exp()
        return self.high - numbers.exp() if math.isfinite(self.high) else 3 * numbers


def results(model, poses, sizes, inputs, **options):
    """Return predictions, pose weights, and the gradient of each parameter."""
    torch.manual_seed(1)
    output = model(poses, sizes, inputs, **options)
    loss = (output.prediction * torch.arange(1, len(sizes) + 1)).sum()
    loss = loss + 0.1 * output.pose_predictions.square().sum()
    params = [param for param in model.parameters() if param.requires_grad]
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    weights = model.pose_weights(output.pose_predictions, sizes, inputs)
    return [output.prediction.detach(), weights, *gradients]


def without_batches(monkeypatch):
    monkeypatch.setattr(compounds, "SMALLEST_BATCH", math.inf)


def assert_equal(found, expected):
    # The same operations, but a sum over one axis of a matrix may run in another order. A gradient
    # whose terms cancel has the roundoff of these terms, which are of order 1 to 100.
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def has_combine(right) -> bool:
    return overrides(type(right.make()), "combine")


@pytest.mark.parametrize("right", [*filter(has_combine, RIGHT)], ids=lambda right: right.name)
@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_a_batch_of_each_right_combination_gives_the_numbers_of_the_loop(
    right, gradients, monkeypatch
):
    combination = right.make().double()
    sizes = [max(size, combination.min_poses) for size in SIZES]
    poses = torch.randn(sum(sizes), 4, dtype=torch.float64)
    probes = Subject(combination, 0).probes  # some pose inputs are labels
    of_compounds = [probes.poses(size).inputs for size in sizes]
    inputs = {
        name: torch.cat([own[name] for own in of_compounds]) for name in combination.pose_inputs
    }
    model = MultiPoseModel(InDomain(combination.domain), combination, gradients=gradients)
    state = {name: buffer.clone() for name, buffer in combination.named_buffers()}
    found = results(model, poses, sizes, inputs, collated=True)
    combination.load_state_dict(state, strict=False)  # running averages go on from call to call
    without_batches(monkeypatch)
    assert_equal(found, results(model, poses, sizes, inputs, collated=True))


def test_most_right_combinations_run_in_batches():
    """These do not: stochastic ones, control flow on numbers, attributes or buffers that change."""
    names = []
    for right in filter(has_combine, RIGHT):
        combination = right.make().double()
        rows = 0.1 + 0.8 * torch.rand(4, 5, dtype=torch.float64)
        probes = Subject(combination, 0).probes
        of_compounds = [probes.poses(5).inputs for _ in rows]
        inputs = {
            name: torch.stack([own[name] for own in of_compounds])
            for name in combination.pose_inputs
        }
        if not batchability(combination).find_out(combination, (rows, inputs)):
            names.append(right.name)
    expected = [
        "mean of the poses that are not NaN",
        "median",
        "quantile, interpolated",
        "branches on the data: whichever end is further is the pivot",
        "Gumbel softmax",
        "dropout of poses",
        "deviation from a running average, kept in a buffer",
        "the last hundred values kept as numbers, for a log",
        "closed form that starts from the derived one",
        "combine by an autograd function that refuses a second derivative",
        "scale that runs along with the predictions",
        "positive pose input: mean with weights, closed form",
    ]
    if Version(torch.__version__) < Version("2.7"):  # its vmap refuses predictions[argmin]
        expected.insert(-1, "pose input: the prediction of the pose that docks best")
    assert [name for name in names if "label" not in name] == expected


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("make", [SmoothMinimum, Scored], ids=lambda make: make.__name__)
def test_a_batch_gives_the_numbers_of_a_call_for_each_compound(pose_model, gradients, make):
    combination = make().double()
    poses = torch.randn(sum(SIZES), 4, dtype=torch.float64)
    inputs = {name: torch.randn(sum(SIZES)).double() for name in combination.pose_inputs}
    model = MultiPoseModel(pose_model, combination, gradients=gradients)
    found = results(model, poses, SIZES, inputs)
    columns = [poses.split(SIZES), *(numbers.split(SIZES) for numbers in inputs.values())]
    outputs = [
        model(own, pose_inputs=dict(zip(inputs, own_inputs, strict=True)))
        for own, *own_inputs in zip(*columns, strict=True)
    ]
    loss = sum(i * out.prediction for i, out in enumerate(outputs, start=1))
    loss = loss + 0.1 * sum(out.pose_predictions.square().sum() for out in outputs)
    weights = [
        combination.pose_weights(
            out.pose_predictions.detach(), **dict(zip(inputs, own_inputs, strict=True))
        )
        for out, *own_inputs in zip(outputs, *columns[1:], strict=True)
    ]
    expected = [torch.stack([out.prediction for out in outputs]), torch.cat(weights)]
    params = list(model.parameters())
    expected += torch.autograd.grad(loss, params, allow_unused=True)
    assert_equal(found, expected)


@pytest.mark.parametrize("sizes", [[5] * 6, SIZES], ids=["equal", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_low_precision_gives_the_numbers_of_the_loop(sizes, dtype, monkeypatch):
    predictions = (10 * torch.randn(sum(sizes))).to(dtype)
    combination = SmoothMinimum()
    found = compounds.combine_compounds(combination, predictions, {}, sizes, closed_form=True)
    assert found.dtype == dtype
    without_batches(monkeypatch)
    expected = compounds.combine_compounds(combination, predictions, {}, sizes, closed_form=True)
    # Both are computed in float32 and rounded once.
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_three_compounds_with_equal_numbers_of_poses_are_one_call():
    calls = []

    class Mean(Combination):
        def combine(self, predictions: Tensor) -> Tensor:
            calls.append(len(predictions))
            return predictions.mean()

    combination = Mean()
    for _ in range(2):  # the first call compares a batch with a loop
        calls.clear()
        compounds.combine_compounds(
            combination, torch.randn(sum(SIZES)), {}, SIZES, closed_form=True
        )
    assert calls == [1, 2, 2, 3, 5, 8]  # 1, 3 and 5 three times in SIZES


def python_calls(function) -> int:
    """Return how many functions, written in Python or in C, a call runs."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_a_step_runs_no_python_for_each_compound(gradients):
    model = MultiPoseModel(InDomain((-math.inf, math.inf)), SmoothMinimum(), gradients=gradients)

    def step(n_compounds):
        sizes = torch.arange(n_compounds) % 4 + 1
        poses = torch.randn(int(sizes.sum()), 4, dtype=torch.float64)
        output = model(poses, sizes, collated=True)
        model.pose_weights(output.pose_predictions, sizes)
        output.prediction.sum().backward()

    for _ in range(4):  # the first calls compare batches with a loop, and runs with one another
        step(20)
    assert python_calls(lambda: step(20)) == python_calls(lambda: step(2000))


# Combinations that vmap cannot run, or runs wrongly.


class Branches(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mean() if predictions.sum() > 0 else predictions.amin()


class BranchesFarAway(Combination):
    """The first batch does not show that control flow depends on numbers."""

    far = False

    def combine(self, predictions: Tensor) -> Tensor:
        if self.far and predictions.amax() > 0:
            return predictions.amax()
        return predictions.mean()


class Stochastic(Combination):
    stochastic = True

    def combine(self, predictions: Tensor) -> Tensor:
        return (predictions * torch.rand_like(predictions)).sum()


class Undeclared(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return (predictions * torch.rand_like(predictions)).sum()


class CountsCalls(Combination):
    def __init__(self):
        super().__init__()
        self.n_calls = 0

    def combine(self, predictions: Tensor) -> Tensor:
        self.n_calls += 1
        return self.n_calls * predictions.mean()


class KeepsLast(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        self.last = predictions.detach()
        return predictions.mean()


class RunningAverage(Combination):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))

    def combine(self, predictions: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * predictions.detach().mean()
        return predictions.mean() - self.average


class WrongRule(torch.autograd.Function):
    """A sum of squares whose rule for vmap adds up the compounds, too."""

    @staticmethod
    def forward(predictions):
        return predictions.square().sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        (predictions,) = ctx.saved_tensors
        return 2 * grad_output * predictions

    @staticmethod
    def vmap(info, in_dims, predictions):
        return predictions.square().sum().expand(info.batch_size), 0


class SumOfSquares(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return WrongRule.apply(predictions)


class Quantile(Combination):
    """An operation that warns when vmap runs it."""

    def combine(self, predictions: Tensor) -> Tensor:
        return torch.quantile(predictions, 0.3)


class InPlace(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mul_(2).mean()


class OwnGradient(Combination):
    """Takes a derivative itself, which vmap refuses."""

    def combine(self, predictions: Tensor) -> Tensor:
        with torch.enable_grad():
            y = predictions.detach().requires_grad_()
            (slope,) = torch.autograd.grad(y.square().sum(), y)
        return (slope * predictions).sum()


ONE_BY_ONE = [
    Branches,
    Stochastic,
    Undeclared,
    CountsCalls,
    KeepsLast,
    RunningAverage,
    SumOfSquares,
    Quantile,
    OwnGradient,
]


@pytest.mark.parametrize("make", ONE_BY_ONE, ids=lambda make: make.__name__)
def test_what_cannot_be_batched_is_combined_one_by_one(make, monkeypatch, capfd):
    predictions = torch.randn(sum(SIZES), dtype=torch.float64, requires_grad=True)

    def run():
        combination = make()
        found = []
        for _ in range(2):
            torch.manual_seed(3)
            found.append(
                compounds.combine_compounds(combination, predictions, {}, SIZES, closed_form=True)
            )
        gradients = torch.autograd.grad(sum(each.sum() for each in found), predictions)
        return [*found, *gradients, *combination.buffers()], combination

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, combination = run()
    assert batchability(combination).verdict(combination) is not True
    without_batches(monkeypatch)
    for one, other in zip(found, run()[0], strict=True):
        assert torch.equal(one, other)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("sizes", [None, [7], [3, 4], [2, 2, 3]], ids=str)
def test_a_change_of_the_predictions_in_place_is_an_error_in_training(pose_model, poses, sizes):
    model = MultiPoseModel(pose_model, InPlace())
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(poses, sizes)


def test_control_flow_that_shows_later_falls_back_to_the_loop():
    combination = BranchesFarAway()
    predictions = torch.randn(12)
    compounds.combine_compounds(combination, predictions, {}, [3] * 4, closed_form=True)
    assert batchability(combination).verdict(combination) is True
    combination.far = True
    found = compounds.combine_compounds(combination, predictions + 9, {}, [3] * 4, closed_form=True)
    assert torch.equal(found, (predictions + 9).view(4, 3).amax(1))
    assert batchability(combination).verdict(combination) is False


class Logs(Combination):
    """Keeps its weights for a log, if it is told to, or in evaluation."""

    log = False

    def combine(self, predictions: Tensor) -> Tensor:
        weights = torch.softmax(predictions, dim=0)
        if self.log or not self.training:
            self.weights = weights.detach()
        return (weights * predictions).sum()


@pytest.mark.parametrize("change", [lambda c: setattr(c, "log", True), lambda c: c.eval()])
def test_an_attribute_that_is_set_later_is_that_of_the_loop(change):
    combination, predictions = Logs(), torch.randn(12)
    compounds.combine_compounds(combination, predictions, {}, [3] * 4, closed_form=True)
    assert batchability(combination).verdict(combination) is True
    change(combination)
    compounds.combine_compounds(combination, predictions, {}, [3] * 4, closed_form=True)
    assert batchability(combination).verdict(combination) is not True
    assert torch.equal(combination.weights, torch.softmax(predictions[-3:], dim=0))


def values_and_gradients(combination, predictions, sizes):
    """Return values, and the gradient of a loss on them with respect to the predictions."""
    y = predictions.clone().requires_grad_()
    values = compounds.combine_compounds(combination, y, {}, sizes, closed_form=True)
    (gradient,) = torch.autograd.grad((values * torch.arange(1, len(sizes) + 1)).sum(), y)
    return [values.detach(), gradient]


class HardMinimum(Combination):
    smooth = False

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.min()  # shares its derivative among ties, and min(dim) does not


class Fallback(Combination):
    """The mean, if a matrix of the predictions is singular."""

    def combine(self, predictions: Tensor) -> Tensor:
        distances = (predictions[:, None] - predictions).abs()
        try:
            return torch.linalg.cholesky(torch.exp(-distances)).sum()
        except torch.linalg.LinAlgError:
            return predictions.mean()


class Bootstrap(Combination):
    """Draws a pose at random, without a word; for one pose there is nothing to draw."""

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions[random.randrange(len(predictions))]


class Noisy(Combination):
    noise = 1.0

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mean() + self.noise * random.gauss(0, 1)


class KeepsInAnObject(Combination):
    def __init__(self):
        super().__init__()
        self.tracker = type("Tracker", (), {})()
        self.tracker.values = []

    def combine(self, predictions: Tensor) -> Tensor:
        self.tracker.values.append(predictions.detach())
        return predictions.mean()


class LazyParameter(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        if not hasattr(self, "factors"):
            self.factors = torch.nn.Parameter(torch.ones_like(predictions.detach()))
        return (self.factors.detach() * predictions).mean()


class WeightsByNumber(Combination):
    """Keeps tensors outside of the instance, by number of poses."""

    cache: ClassVar[dict[int, Tensor]] = {}

    def combine(self, predictions: Tensor) -> Tensor:
        n_poses = len(predictions)
        if n_poses not in self.cache:
            self.cache[n_poses] = torch.ones_like(predictions.detach()) / n_poses
        return (self.cache[n_poses] * predictions).sum()


TIED = torch.tensor([1.0, 1.0, 2.0] * 4)
SINGULAR = torch.tensor([0.0, 1.0, 3.0] * 3 + [2.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        pytest.param(HardMinimum, [(torch.randn(12), [3] * 4), (TIED, [3] * 4)], id="ties"),
        pytest.param(Fallback, [(torch.randn(12), [3] * 4), (SINGULAR, [3] * 4)], id="except"),
        pytest.param(Bootstrap, [(torch.randn(21), [1] * 5 + [4] * 4)], id="mostly one pose"),
        pytest.param(
            Bootstrap, [(torch.randn(5), [1] * 5), (torch.randn(16), [4] * 4)], id="one pose first"
        ),
        pytest.param(
            Noisy, [(torch.randn(12) - 1e6, [3] * 4), (torch.randn(12), [3] * 4)], id="large first"
        ),
        pytest.param(
            Noisy,
            [(torch.full((12,), torch.inf), [3] * 4), (torch.randn(12), [3] * 4)],
            id="infinite first",
        ),
        pytest.param(KeepsInAnObject, [(torch.randn(12), [3] * 4)], id="object"),
        pytest.param(LazyParameter, [(torch.randn(12), [3] * 4)] * 2, id="lazy parameter"),
        pytest.param(
            WeightsByNumber,
            [(torch.randn(12), [3] * 4), (torch.randn(18), [2, 4] * 3), (torch.randn(4), [4])],
            id="cache",
        ),
    ],
)
def test_any_sequence_of_calls_gives_the_numbers_of_the_loop(make, calls, monkeypatch):
    def run():
        random.seed(5)
        WeightsByNumber.cache.clear()
        combination = make()
        found = [n for call in calls for n in values_and_gradients(combination, *call)]
        kept = getattr(combination, "tracker", None)
        return found + ([] if kept is None else [torch.stack(kept.values)])

    found = run()
    without_batches(monkeypatch)
    for one, other in zip(found, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


class Switches(Combination):
    """Does what vmap cannot, if it is switched on."""

    def __init__(self):
        super().__init__()
        self.noise = 0.0
        self.log = None
        self.calibrates = False
        self.register_buffer("centre", torch.zeros(()))

    def combine(self, predictions: Tensor) -> Tensor:
        if self.log is not None:
            self.log.append(predictions.detach())
        if self.calibrates:
            self.centre = predictions.detach().mean()
        value = predictions.mean() - self.centre
        return value + self.noise * random.gauss(0, 1) if self.noise else value


@pytest.mark.parametrize(("name", "value"), [("noise", 1.0), ("log", []), ("calibrates", True)])
def test_a_switch_that_is_turned_later_is_seen(name, value, monkeypatch):
    def run():
        random.seed(5)
        combination = Switches()
        found = values_and_gradients(combination, predictions, [3] * 4)
        setattr(combination, name, copy.copy(value))
        found += values_and_gradients(combination, predictions, [3] * 4)
        return [*found, combination.centre, torch.stack(combination.log or [predictions])]

    predictions = torch.randn(12)
    found = run()
    without_batches(monkeypatch)
    for one, other in zip(found, run(), strict=True):
        assert torch.equal(one, other)


def test_a_temperature_that_changes_with_each_step_is_compared_once(monkeypatch):
    combination, compared = SmoothMinimum(), []
    combination.t = 1.0
    check = batchable.check_can_batch
    monkeypatch.setattr(batchable, "check_can_batch", lambda *a: compared.append(1) or check(*a))
    for step in range(4):
        combination.t = 1.0 / (step + 1)
        compounds.combine_compounds(combination, torch.randn(12), {}, [3] * 4, closed_form=True)
    assert len(compared) == 1


def test_a_first_call_in_inference_mode_decides_nothing_wrong():
    combination = SmoothMinimum()
    with torch.inference_mode():
        compounds.combine_compounds(combination, torch.randn(12), {}, [3] * 4, closed_form=True)
    assert batchability(combination).verdict(combination) is True


def test_combinations_that_are_equal_are_not_the_same():
    class Equal(Switches):
        def __eq__(self, other):
            return isinstance(other, Equal)

        def __hash__(self):
            return 0

    one, other = Equal(), Equal()
    compounds.combine_compounds(one, torch.randn(12), {}, [3] * 4, closed_form=True)
    assert batchability(one).verdict(one) is True
    assert batchability(other).verdict(other) is None


def test_what_is_known_of_a_combination_is_forgotten_with_it():
    combination = SmoothMinimum()
    compounds.combine_compounds(combination, torch.randn(12), {}, [3] * 4, closed_form=True)
    n_known = len(batchable._KNOWN)
    del combination
    assert len(batchable._KNOWN) == n_known - 1


def test_the_first_batch_keeps_random_states():
    random.seed(1)
    before = random.getstate()
    combination = Noisy()
    assert not batchability(combination).find_out(combination, (torch.randn(4, 3), {}))
    assert random.getstate() == before


def test_train_and_eval_in_another_thread_stay():
    combination = SmoothMinimum()
    with attributes_unchanged(combination):
        combination.eval()
    assert not combination.training


class AllPairs(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return (predictions[:, None] - predictions).square().mean()


def test_a_batch_of_compounds_with_many_poses_is_cut(monkeypatch):
    sizes = []
    over_rows = evaluation.over_rows
    monkeypatch.setattr(
        evaluation, "over_rows", lambda f, y, named: sizes.append(len(y)) or over_rows(f, y, named)
    )
    monkeypatch.setattr(compounds, "LARGEST_BATCH", 4 * 100**2)
    combination, y = AllPairs(), torch.randn(10 * 100)
    found = compounds.combine_compounds(combination, y, {}, [100] * 10, closed_form=True)
    assert sizes[-3:] == [4, 4, 2]
    torch.testing.assert_close(
        found, torch.stack([combination.combine(own) for own in y.view(10, 100)])
    )


def test_a_batch_that_is_out_of_memory_becomes_a_loop(monkeypatch):
    def over_rows(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    combination, y = AllPairs(), torch.randn(12)
    compounds.combine_compounds(combination, y, {}, [3] * 4, closed_form=True)
    monkeypatch.setattr(evaluation, "over_rows", over_rows)
    found = compounds.combine_compounds(combination, y, {}, [3] * 4, closed_form=True)
    torch.testing.assert_close(
        found, torch.stack([combination.combine(own) for own in y.view(4, 3)])
    )
    assert batchability(combination).verdict(combination) is True


def test_an_error_of_the_author_is_that_of_the_loop():
    class Broken(Combination):
        def combine(self, predictions: Tensor) -> Tensor:
            raise ValueError("the author's words")

    class Vector(Combination):
        def combine(self, predictions: Tensor) -> Tensor:
            return predictions

    predictions = torch.randn(12)
    with pytest.raises(ValueError, match="the author's words"):
        compounds.combine_compounds(Broken(), predictions, {}, [3] * 4, closed_form=True)
    with pytest.raises(CombinationContractError, match=r"shape \(\); found shape \(3,\)"):
        compounds.combine_compounds(Vector(), predictions, {}, [3] * 4, closed_form=True)


def test_a_batch_does_not_change_the_combination():
    combination = SmoothMinimum()
    before = dict(vars(combination))
    compounds.combine_compounds(combination, torch.randn(12), {}, [3] * 4, closed_form=True)
    assert vars(combination) == before
    assert combination.log_t.grad is None


@pytest.mark.parametrize("sizes", [[4] * 6, SIZES], ids=["equal", "ragged"])
def test_the_default_device_does_not_matter(sizes):
    predictions = torch.randn(sum(sizes))
    with torch.device("meta"):
        found = (
            compounds.combine_compounds(Branches(), predictions, {}, sizes, closed_form=True),
            compounds.combine_compounds(Square(), predictions, {}, sizes, closed_form=True),
        )
    for one, make in zip(found, (Branches, Square), strict=True):
        expected = compounds.combine_compounds(make(), predictions, {}, sizes, closed_form=True)
        assert torch.equal(one, expected)


def test_a_model_of_many_compounds_works_inside_transforms(pose_model):
    model = MultiPoseModel(pose_model, SmoothMinimum().double(), collate=torch.stack)
    poses = list(torch.randn(12, 4, dtype=torch.float64))

    def loss(params):
        out = torch.func.functional_call(model, params, (poses, [3] * 4))
        return out.prediction.square().sum()

    params = dict(model.named_parameters())
    found = torch.func.grad(loss)({name: p.detach() for name, p in params.items()})
    expected = torch.autograd.grad(loss(params), list(params.values()))
    assert_equal(found.values(), expected)


# The number of poses of each compound.


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"sizes": torch.tensor([3, 4])}, id="tensor"),
        pytest.param({"sizes": torch.tensor([3, 4], dtype=torch.int32)}, id="int32"),
        pytest.param({"sizes": (torch.tensor(3), 4)}, id="list with a tensor"),
        pytest.param({"ptr": torch.tensor([0, 3, 7])}, id="ptr"),
        pytest.param({"ptr": [0, 3, 7]}, id="ptr as a list"),
    ],
)
def test_sizes_come_as_a_list_a_tensor_or_offsets(pose_model, poses, sizes):
    model = MultiPoseModel(pose_model, SmoothMinimum().double())
    expected = model(poses, [3, 4])
    assert torch.equal(model(poses, **sizes).prediction, expected.prediction)
    assert model.estimate(poses, **sizes).modes == model.estimate(poses, [3, 4]).modes
    weights = model.pose_weights(expected.pose_predictions, [3, 4])
    assert torch.equal(model.pose_weights(expected.pose_predictions, **sizes), weights)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sizes": torch.tensor([3.0, 4.0])}, "sizes must be whole numbers"),
        ({"sizes": torch.tensor([[3, 4]])}, "sizes must be whole numbers"),
        ({"sizes": torch.tensor(7)}, "sizes must be whole numbers"),
        ({"sizes": torch.tensor([8, -1])}, "compound 1: a number of poses must not be negative"),
        ({"sizes": torch.tensor([3, 3])}, "sizes must add up to the number of poses"),
        ({"sizes": torch.tensor([7, 0])}, r"compound 1: .* needs at least 1 pose\(s\); found 0"),
        ({"sizes": torch.tensor([], dtype=torch.int64)}, "sizes must name at least one compound"),
        ({"ptr": [0, 3, 7], "sizes": [3, 4]}, "Pass only one of them"),
        ({"ptr": [1, 3, 7]}, "begin with 0 and never fall"),
        ({"ptr": [0, 4, 3, 7]}, "begin with 0 and never fall"),
        ({"ptr": [0.0, 7.0]}, "begin with 0 and never fall"),
        ({"ptr": [0]}, "begin with 0 and never fall"),
        ({"ptr": [0, 3, 6]}, "sizes must add up to the number of poses"),
    ],
    ids=str,
)
def test_wrong_sizes_are_an_error_that_says_so(pose_model, poses, sizes, message):
    model = MultiPoseModel(pose_model, SmoothMinimum().double())
    with pytest.raises(PredictionError, match=message):
        model(poses, **sizes)
    with pytest.raises(PredictionError, match=message):
        model.pose_weights(torch.randn(7), **sizes)


# Pose weights.


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("enabled", [True, False], ids=["with gradients", "without gradients"])
def test_pose_weights_belong_to_their_compound(pose_model, poses, gradients, enabled):
    model = MultiPoseModel(pose_model, SmoothMinimum().double(), gradients=gradients)
    with torch.set_grad_enabled(enabled):
        predictions = model(poses, [3, 4]).pose_predictions
        weights = model.pose_weights(predictions, [3, 4])
    expected = [model.combination.pose_weights(part) for part in predictions.split([3, 4])]
    torch.testing.assert_close(weights, torch.cat(expected).detach(), rtol=1e-14, atol=0)
    assert not weights.requires_grad


def test_pose_weights_of_one_compound_are_those_of_the_combination(pose_model, poses):
    model = MultiPoseModel(pose_model, SmoothMinimum().double())
    predictions = model(poses).pose_predictions
    expected = model.combination.pose_weights(predictions).detach()
    assert torch.equal(model.pose_weights(predictions), expected)


def test_a_full_depth_combination_has_pose_weights(pose_model, poses):
    class Half(Combination):
        def forward(self, pred_list, grad_dict, param_names, *model_params):
            return HalfFunction.apply(pred_list, grad_dict, param_names, *model_params)

    model = MultiPoseModel(pose_model, Half(), gradients="stored")
    out = model(poses, [3, 4])
    weights = model.pose_weights(out.pose_predictions, [3, 4])
    assert weights.tolist() == [0.5] * 7


class HalfFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred_list, grad_dict, param_names, *model_params):
        ctx.gradients = [torch.stack(grad_dict[name]) for name in param_names]
        return 0.5 * torch.stack(pred_list).sum()

    @staticmethod
    def backward(ctx, grad_output):
        return None, None, None, *(0.5 * grad_output * g.sum(0) for g in ctx.gradients)


@pytest.mark.parametrize(
    "combination", [SmoothMinimum().double(), Branches()], ids=["closed form", "derived"]
)
@pytest.mark.parametrize("change", [lambda y: y, Tensor.detach], ids=["output", "detached"])
def test_a_combination_refuses_the_predictions_for_several_compounds(
    pose_model, poses, combination, change
):
    model = MultiPoseModel(pose_model, combination)
    out = model(poses, [3, 4])
    message = r"for one compound; found those for 2 compounds. Call model.pose_weights\("
    with pytest.raises(PredictionError, match=message):
        combination.pose_weights(change(out.pose_predictions))
    with pytest.raises(PredictionError, match="Pass the sizes of that call"):
        model.pose_weights(out.pose_predictions)
    with pytest.raises(PredictionError, match="Pass the sizes of that call"):
        model.pose_weights(out.pose_predictions, [4, 3])
    weights = model.pose_weights(out.pose_predictions, [3, 4])
    with pytest.raises(PredictionError, match="made these pose weights, for 2 compounds"):
        effective_poses(weights)
    combination.pose_weights(out.pose_predictions[:3])  # the first compound
    combination.pose_weights(model(poses).pose_predictions)


class Closed(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mean()


def weights_of(y):
    return torch.full_like(y, 1 / len(y))


class ByStaticMethod(Closed):
    pose_weights = staticmethod(weights_of)


class ByOtherName(Closed):
    def pose_weights(self, y):
        return weights_of(y)


class Mixin:
    def pose_weights(self, predictions):
        return weights_of(predictions)


class ByMixin(Mixin, Closed):
    pass


@pytest.mark.parametrize("make", [ByStaticMethod, ByOtherName, ByMixin])
def test_pose_weights_may_be_written_in_any_way(pose_model, poses, make):
    model = MultiPoseModel(pose_model, make(), gradients="stored")
    out = model(poses, [3, 4])
    out.prediction.sum().backward()
    expected = [1 / 3] * 3 + [1 / 4] * 4
    assert model.pose_weights(out.pose_predictions, [3, 4]).tolist() == pytest.approx(expected)
    assert make().pose_weights(torch.zeros(2)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("make", [ByOtherName, ByMixin])
def test_every_method_pose_weights_refuses_several_compounds(pose_model, poses, make):
    out = MultiPoseModel(pose_model, make())(poses, [3, 4])
    with pytest.raises(PredictionError, match="found those for 2 compounds"):
        make().pose_weights(out.pose_predictions)
    if make is ByOtherName:
        assert make().pose_weights(y=torch.zeros(2)).tolist() == [0.5, 0.5]


def test_noted_sizes_are_forgotten_with_the_predictions(pose_model, poses):
    before = len(evaluation._SIZES)
    out = MultiPoseModel(pose_model, SmoothMinimum().double())(poses, [3, 4])
    assert len(evaluation._SIZES) == before + 1
    del out
    assert len(evaluation._SIZES) == before


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([1.0, 2.0], "found <class 'list'>"),
        (torch.zeros(2, 2), r"found \(2, 2\)"),
        (torch.zeros(2, dtype=torch.int64), "floating-point numbers"),
        (torch.zeros(0), "expected at least one pose"),
    ],
    ids=str,
)
def test_pose_weights_need_a_vector(pose_model, predictions, message):
    model = MultiPoseModel(pose_model, SmoothMinimum().double())
    with pytest.raises(PredictionError, match=message):
        model.pose_weights(predictions)


def test_pose_weights_need_the_pose_inputs(pose_model):
    model = MultiPoseModel(pose_model, Scored())
    with pytest.raises(PredictionError, match="Scored needs pose_inputs"):
        model.pose_weights(torch.zeros(3))
