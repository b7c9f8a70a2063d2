"""Hooks, losses and kept graphs around the predictions: as in graph, or an error."""

import functools

import pytest
import torch
from same_as_graph import RIGHT_OR_ERROR, SCALES, Case, Hidden, Minimum, in_each_mode, step, table
from torch import nn
from torch.nn.functional import linear, softplus
from torch.nn.utils import parametrize

from mtenn_core import MultiPoseModel
from mtenn_core.errors import MtennError

# --- an optimizer that steps inside of backward ---------------------------------------------------


class Experts(nn.Module):
    """Has an expert for poses on each side. Only one pose uses the last expert."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))

    def forward(self, pose):
        hidden = torch.tanh(self.hidden(pose))
        return self.experts[int(pose[0] > 0) + int(pose[0] > 1)](hidden)


class ExpertReadWithoutGraph(Experts):
    """Each pose reads an expert, and only one pose trains it."""

    def forward(self, pose):
        return super().forward(pose) * self.experts[2].weight.detach().norm()


class ExpertReadBehindZeros(ExpertReadWithoutGraph):
    """No prediction shows a change of that expert, and the gradients do."""

    def __init__(self):
        super().__init__()
        for expert in self.experts:
            nn.init.zeros_(expert.weight)
            nn.init.zeros_(expert.bias)
        nn.init.ones_(self.experts[2].weight)

    def forward(self, pose):
        hidden = torch.tanh(self.hidden(pose)) * self.experts[2].weight.detach().norm()
        return self.experts[2 * int(pose[0] > 1)](hidden)


def sides():
    return [torch.tensor([x, 0.5, -0.3 * x]) for x in (-1.0, 2.0, -0.5, 0.5, 0.2)]


def in_place(param):
    with torch.no_grad():
        param.sub_(0.1 * param.grad)


def in_data(param):
    param.data.sub_(0.1 * param.grad)


def assigned(param):
    param.data = param.data - 0.1 * param.grad


def with_optimizer(param):
    torch.optim.SGD([param], lr=0.1).step()


def stepping(update):
    """Return a step whose backward updates each parameter when its gradient is ready."""

    def after(param):
        update(param)
        param.grad = None

    def run(model, poses):
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(after)
        step(model, poses)
        return step(model, poses)

    return run


UPDATES = {"in place": in_place, "data": in_data, "assigned": assigned, "SGD": with_optimizer}
OPTIMIZERS = {
    f"{model.__name__}, {name}": Case(
        model, sides, recomputed=RIGHT_OR_ERROR, step=stepping(update)
    )
    for model in (Hidden, Experts, ExpertReadWithoutGraph, ExpertReadBehindZeros)
    for name, update in UPDATES.items()
}


@in_each_mode(OPTIMIZERS)
def test_an_optimizer_may_step_inside_of_backward(case, gradients, scale):
    case.check(gradients, scale)


def test_a_step_between_two_backwards_is_an_error_for_each_pose_that_uses_the_parameter():
    """The first pose that runs again does not use the changed parameter, and the next one does."""
    pose_model, poses = Experts(), sides()
    out = MultiPoseModel(pose_model, Minimum(1.0), gradients="recomputed")(poses)
    expert = pose_model.experts[0].weight
    with torch.no_grad():
        expert.mul_(1.1)
    other = pose_model.experts[2].weight
    torch.autograd.grad(out.pose_predictions[1], other, retain_graph=True)
    for _ in range(2):
        with pytest.raises(MtennError, match=r"experts\.0\.weight' was changed in place"):
            torch.autograd.grad(out.pose_predictions[0], expert, retain_graph=True)


# --- losses that the pose model keeps -------------------------------------------------------------


class Bayesian(Hidden):
    """Draws its weights. Their scale is used by the sample and by the divergence."""

    def __init__(self):
        super().__init__()
        self.rho = nn.Parameter(torch.full((6, 3), -1.0))

    def forward(self, pose):
        mean, scale = self.hidden.weight, softplus(self.rho)
        self.penalty = (mean.square() + scale.square() - 1).sum() / 2 - scale.log().sum()
        weight = mean + scale * torch.randn(6, 3)
        return self.readout(torch.tanh(linear(pose, weight, self.hidden.bias)))


class BayesianList(Bayesian):
    """Adds up the divergences of all poses."""

    def __init__(self):
        super().__init__()
        self.divergences = []

    def forward(self, pose):
        prediction = super().forward(pose)
        self.divergences.append(self.penalty)
        self.penalty = sum(self.divergences)
        return prediction


class OfActivations(Hidden):
    def __init__(self):
        super().__init__()
        self.activations = []

    def forward(self, pose):
        self.activations.append(torch.tanh(self.hidden(pose)))
        self.penalty = torch.stack(self.activations).square().sum()
        return self.readout(self.activations[-1])


class OfActivationsFromAHook(Hidden):
    """A forward hook adds the penalty up."""

    def __init__(self):
        super().__init__()
        self.penalty = 0.0
        self.hidden.register_forward_hook(self._add)

    def _add(self, module, args, hidden):
        self.penalty = self.penalty + hidden.square().sum()


class OfTheLastPose(Hidden):
    def forward(self, pose):
        hidden = torch.tanh(self.hidden(pose))
        self.penalty = hidden.square().sum()
        return self.readout(hidden)


class OfParameters(Hidden):
    def forward(self, pose):
        self.penalty = sum(p.square().sum() for p in self.parameters())
        return super().forward(pose)


class OfOtherParameters(Hidden):
    """No prediction uses these parameters."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(2, 2)

    def forward(self, pose):
        self.penalty = self.other.weight.square().sum() + self.other(pose[:2]).exp().sum()
        return super().forward(pose)


PENALTIES = {
    "divergence": Bayesian,
    "divergences": BayesianList,
    "activations": OfActivations,
    "activations from a hook": OfActivationsFromAHook,
    "last activation": OfTheLastPose,
    "parameters": OfParameters,
    "other parameters": OfOtherParameters,
}


def loss_of(model, out):
    return model.combination.loss(out) + 0.3 * model.pose_model.penalty


def by_backward(model, poses):
    out = model(poses)
    loss_of(model, out).backward()
    return out


def by_grad(model, poses):
    out = model(poses)
    params = list(model.parameters())
    found = torch.autograd.grad(loss_of(model, out), params, allow_unused=True)
    for param, gradient in zip(params, found, strict=True):
        param.grad = gradient
    return out


def by_inputs(model, poses):
    out = model(poses)
    loss_of(model, out).backward(inputs=list(model.parameters()))
    return out


def by_some_inputs(model, poses):
    out = model(poses)
    loss_of(model, out).backward(inputs=[model.pose_model.hidden.weight])
    return out


def penalty_first(model, poses):
    out = model(poses)
    (0.3 * model.pose_model.penalty).backward(retain_graph=True)
    model.combination.loss(out).backward()
    return out


def prediction_first(model, poses):
    out = model(poses)
    penalty = 0.3 * model.pose_model.penalty
    model.combination.loss(out).backward(retain_graph=True)
    penalty.backward()
    return out


def only_the_penalty(model, poses):
    out = model(poses)
    model.pose_model.penalty.backward()
    return out


BASIC = (by_backward, penalty_first)
FURTHER = (by_grad, by_inputs, by_some_inputs, prediction_first, only_the_penalty)
LOSSES = {
    f"{name}, {take.__name__}": Case(make, recomputed=RIGHT_OR_ERROR, step=take)
    for name, make in PENALTIES.items()
    for take in BASIC + FURTHER * (make in (Bayesian, OfActivations, OfParameters))
}


@in_each_mode(LOSSES)
def test_a_loss_may_use_what_the_pose_model_keeps(case, gradients, scale):
    case.check(gradients, scale)


# --- parts that are computed once for all poses ---------------------------------------------------


class Kept(nn.Module):
    """Computes a part of the graph at the first pose, and keeps it for the other poses."""

    def __init__(self):
        super().__init__()
        self.receptor, self.ligand = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), Hidden()
        self._kept = None

    def forward(self, pose):
        if self._kept is None:
            self._kept = self.receptor(torch.ones(3))
        return self.ligand(pose * self._kept)

    def forget(self):
        self._kept = None


class KeptInADict(Kept):
    """There is one part for the poses of each side."""

    def forward(self, pose):
        side = float(pose[0] > 0)
        if self._kept is None:
            self._kept = {}
        if side not in self._kept:
            self._kept[side] = self.receptor(torch.full((3,), side))
        return self.ligand(pose * self._kept[side])


class KeptByACache(Kept):
    def __init__(self):
        super().__init__()
        self._embedding = functools.cache(lambda: self.receptor(torch.ones(3)))

    def forward(self, pose):
        return self.ligand(pose * self._embedding())

    def forget(self):
        self._embedding.cache_clear()


class KeptOfParameters(Kept):
    """The part has no input besides parameters."""

    def forward(self, pose):
        if self._kept is None:
            self._kept = self.receptor[0].weight.square().sum(1)
        return self.ligand(pose * self._kept)


class KeptWithDropout(Kept):
    def __init__(self):
        super().__init__()
        self.receptor.append(nn.Dropout(0.5))


class KeptOnlyAdded(Kept):
    """The graphs of poses save nothing of the part."""

    def forward(self, pose):
        if self._kept is None:
            self._kept = self.receptor(torch.ones(3))
        return self.ligand(pose) + self._kept.sum()


class KeptFromOutside(Kept):
    """The part is computed before the call."""

    def forward(self, pose):
        return self.ligand(pose * self._kept)

    def forget(self):
        self._kept = self.receptor(torch.ones(3))


class KeptTwoParts(KeptFromOutside):
    """One part depends on another part."""

    def forward(self, pose):
        if not isinstance(self._kept, tuple):
            self._kept = (self._kept, self.receptor(self._kept))
        return self.ligand(pose * self._kept[0] + self._kept[1])


class Symmetric(nn.Module):
    def forward(self, weight):
        return torch.tanh(weight.triu() + weight.triu(1).T)


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.ligand = nn.Linear(3, 3), Hidden()
        parametrize.register_parametrization(self.first, "weight", Symmetric())

    def forward(self, pose):
        return self.ligand(torch.tanh(self.first(pose)))


def forgetting(model, poses):
    """Two steps, each with its own part."""
    for _ in range(2):
        model.pose_model.forget()
        out = step(model, poses)
    return out


def two_steps(model, poses):
    for _ in range(2):
        step(model, poses)
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(1.1)


def cached(model, poses):
    with parametrize.cached():
        return step(model, poses)


KEPT = {
    "attribute": Kept,
    "dict": KeptInADict,
    "functools.cache": KeptByACache,
    "of parameters": KeptOfParameters,
    "dropout": KeptWithDropout,
    "only added": KeptOnlyAdded,
    "from outside": KeptFromOutside,
    "two parts": KeptTwoParts,
}


@in_each_mode(
    table(
        {name: make for name, make in KEPT.items() if name != "functools.cache"},
        recomputed=RIGHT_OR_ERROR,
        step=forgetting,
    ),
    # Only attributes and buffers of modules are searched for parts that are kept.
    table(
        {"functools.cache": KeptByACache},
        stored=RIGHT_OR_ERROR,
        recomputed=RIGHT_OR_ERROR,
        step=forgetting,
    ),
    table(
        {"parametrize.cached": Parametrized},
        stored=RIGHT_OR_ERROR,
        recomputed=RIGHT_OR_ERROR,
        step=cached,
    ),
)
def test_a_part_may_be_computed_once_for_all_poses(case, gradients, scale):
    case.check(gradients, scale)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("gradients", ["graph", "stored", "recomputed"])
@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_a_part_of_the_previous_step_is_an_error(make, gradients, scale):
    poses = [torch.randn(3) for _ in range(5)]
    pose_model = make()
    pose_model.forget()
    model = MultiPoseModel(pose_model, Minimum(scale), gradients=gradients)
    # "recomputed" cannot see what a cache keeps, and then torch's words name its device.
    with pytest.raises((RuntimeError, MtennError), match=r"a second time|gradients=|device meta"):
        two_steps(model, poses)


# --- gradients of single poses, from pairs of hooks -----------------------------------------------


class PerSample(Hidden):
    """Notes the gradient of each pose, as Opacus does: one hook appends, the other pops."""

    def __init__(self):
        super().__init__()
        for module in (self.hidden, self.readout):
            module.activations = []
            module.register_forward_hook(self._append)
            module.register_full_backward_hook(self._pop)
            for param in module.parameters():
                param._forward_counter = 0
                param.grad_sample = []

    def _append(self, module, args, output):
        if torch.is_grad_enabled():
            module.activations.append(args[0].detach())
            for param in module.parameters():
                param._forward_counter += 1

    def _pop(self, module, grad_input, grad_output):
        activation, (gradient,) = module.activations.pop(), grad_output
        if gradient is None:  # the pose has no weight
            gradient = torch.zeros(module.out_features)
        module.weight.grad_sample.append(torch.outer(gradient, activation))
        for param in module.parameters():
            param._forward_counter -= 1
        if not module.activations:
            module.weight.grad_sample = torch.stack(module.weight.grad_sample)


class PerSampleNorms(PerSample):
    """Keeps only norms, in the order of backward."""

    def _pop(self, module, grad_input, grad_output):
        activation, (gradient,) = module.activations.pop(), grad_output
        size = 0.0 if gradient is None else gradient.norm() * activation.norm()
        module.weight.grad_sample.append(float(size))


class ActivationsByNumber(PerSample):
    """The backward hook looks the activation up by a counter."""

    def __init__(self):
        super().__init__()
        self.hidden.number = self.readout.number = 0

    def _append(self, module, args, output):
        module.activations.append(args[0].detach())
        module.number += 1

    def _pop(self, module, grad_input, grad_output):
        module.number -= 1
        activation, (gradient,) = module.activations[module.number], grad_output
        if gradient is not None:
            module.weight.grad_sample.append(torch.outer(gradient, activation))


class LastActivation(PerSample):
    """The backward hook uses the activation of the last run."""

    def _append(self, module, args, output):
        module.last = args[0].detach()

    def _pop(self, module, grad_input, grad_output):
        (gradient,) = grad_output
        if gradient is not None:
            module.weight.grad_sample.append(torch.outer(gradient, module.last))


class OutputHooks(PerSample):
    """A hook on the output of each layer takes the activation with it."""

    def _append(self, module, args, output):
        activation = args[0].detach()

        def note(gradient):
            if gradient is not None:
                module.weight.grad_sample.append(torch.outer(gradient, activation))

        output.register_hook(note)

    def _pop(self, module, grad_input, grad_output):
        pass


PER_SAMPLE = {
    "Opacus": PerSample,
    "norms": PerSampleNorms,
    "by number": ActivationsByNumber,
    "last activation": LastActivation,
    "output hooks": OutputHooks,
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
# In "stored", backward hooks of modules run before the weighting. The documentation says so.
@in_each_mode(table(PER_SAMPLE, stored=None, recomputed=RIGHT_OR_ERROR))
def test_pairs_of_hooks_see_each_pose_once(case, gradients, scale):
    case.check(gradients, scale)
