"""Pose models that inspect or change their parameters: each mode is as graph, or an error."""

import functools
import weakref

import torch
from same_as_graph import RIGHT_OR_ERROR, Hidden, in_each_mode, table
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.functional import linear

# --- what a parameter is --------------------------------------------------------------------------


class Scaled(Hidden):
    """Doubles its prediction if the parameter is what the pose model thinks it is."""

    def forward(self, pose):
        return super().forward(pose) * (2.0 if self.is_known(self.hidden.weight) else 1.0)


class AsksForItsClass(Scaled):
    def is_known(self, weight):
        return isinstance(weight, nn.Parameter)


class AsksIfItIsALeaf(Scaled):
    def is_known(self, weight):
        return weight.is_leaf and weight.grad is None


class AsksForHooks(Scaled):
    def __init__(self):
        super().__init__()
        self.hidden.weight.register_hook(lambda grad: None)

    def is_known(self, weight):
        return bool(weight._backward_hooks)


class KeptInAList(Scaled):
    def __init__(self):
        super().__init__()
        self._kept = [self.hidden.weight]

    def is_known(self, weight):
        return weight is self._kept[0]


class KeptById(KeptInAList):
    def is_known(self, weight):
        return id(weight) in {id(param) for param in self._kept}


class KeptAsKey(KeptInAList):
    def is_known(self, weight):
        return weight in dict.fromkeys(self._kept, 2.0)


class KeptWeakly(Scaled):
    def __init__(self):
        super().__init__()
        self._kept = weakref.ref(self.hidden.weight)

    def is_known(self, weight):
        return weight is self._kept()


class AmongItsParameters(Scaled):
    def is_known(self, weight):
        return any(weight is param for param in self.parameters())


class Marked(Hidden):
    """Has an attribute on a parameter, as muP has."""

    def __init__(self):
        super().__init__()
        self.hidden.weight.infshape = 4.0

    def forward(self, pose):
        return super().forward(pose) / getattr(self.hidden.weight, "infshape", 1.0)


class Temperature(nn.Parameter):
    unit = 2.0

    def value(self):
        return self.unit * self.exp()


class OfASubclass(Hidden):
    def __init__(self):
        super().__init__()
        self.temperature = Temperature(torch.tensor(0.3))

    def forward(self, pose):
        value = getattr(self.temperature, "value", self.temperature.clone)
        return super().forward(pose) / value()


class ReadsNamedParameters(Hidden):
    def forward(self, pose):
        weights = [p for name, p in self.named_parameters() if name.endswith("weight")]
        return super().forward(pose) + 0.1 * sum(w.square().sum() for w in weights)


class ReadsOnlyParameters(Hidden):
    def forward(self, pose):
        params = [p for p in vars(self.hidden)["_parameters"].values() if type(p) is nn.Parameter]
        return super().forward(pose) + 0.1 * sum(p.square().sum() for p in params)


class UsesWhatItKept(KeptInAList):
    """Never reads the parameter from its module."""

    def forward(self, pose):
        return self.readout(torch.tanh(linear(pose, self._kept[0])))


class UsesAClosure(Hidden):
    def __init__(self):
        super().__init__()
        weight = self.hidden.weight
        self._weight = functools.cache(lambda: weight)

    def forward(self, pose):
        return self.readout(torch.tanh(linear(pose, self._weight())))


class UsesBoth(KeptInAList):
    def forward(self, pose):
        return self.readout(torch.tanh(linear(pose, self._kept[0] + self.hidden.weight.square())))


class UsesTiedWeights(Hidden):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(3, 6)
        self.other.weight = self.hidden.weight

    def forward(self, pose):
        same = self.other.weight is self.hidden.weight
        return super().forward(pose) + self.other(pose).sum() * (1.0 if same else 3.0)


WHAT_A_PARAMETER_IS = {
    "isinstance": AsksForItsClass,
    "a leaf": AsksIfItIsALeaf,
    "hooks present": AsksForHooks,
    "identity": KeptInAList,
    "dict by id": KeptById,
    "dict by parameter": KeptAsKey,
    "weak reference": KeptWeakly,
    "one of parameters()": AmongItsParameters,
    "attribute": Marked,
    "method of a subclass": OfASubclass,
    "named_parameters()": ReadsNamedParameters,
    "type is Parameter": ReadsOnlyParameters,
    "used from a list": UsesWhatItKept,
    "used from a closure": UsesAClosure,
    "used from a list and the module": UsesBoth,
    "tied": UsesTiedWeights,
}


@in_each_mode(table(WHAT_A_PARAMETER_IS))
def test_a_parameter_is_what_it_is_outside_of_the_model(case, gradients, scale):
    case.check(gradients, scale)


class Hooked(Hidden):
    """Notes the gradients that a hook on a parameter gets."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.register(self.hidden.weight)

    def note(self, *gradients):
        self.seen.append([g.clone() for g in gradients])


class TensorHook(Hooked):
    def register(self, weight):
        weight.register_hook(self.note)


class MaskingHook(Hooked):
    def register(self, weight):
        weight.register_hook(self.note)
        weight.register_hook(lambda grad: grad * (torch.arange(3) > 0))


class ClippingHook(Hooked):
    def register(self, weight):
        weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))


class PostAccumulateHook(Hooked):
    def register(self, weight):
        weight.register_post_accumulate_grad_hook(lambda param: self.note(param.grad))


class MultiGradHook(Hooked):
    def register(self, weight):
        register_multi_grad_hook([weight, self.readout.bias], lambda grads: self.note(*grads))


class AnyGradHook(Hooked):
    def register(self, weight):
        register_multi_grad_hook([weight, self.readout.bias], self.note_one, mode="any")

    def note_one(self, gradient):
        self.seen.append(len(gradient.shape) > 0)


class NodeHook(Hooked):
    """As DistributedDataParallel does."""

    def register(self, weight):
        self._node = weight.expand_as(weight).grad_fn.next_functions[0][0]
        self._node.register_prehook(lambda gradients: self.note(*gradients))


HOOKS_ON_PARAMETERS = {
    "register_hook": TensorHook,
    "register_hook, mask": MaskingHook,
    "register_hook, clip": ClippingHook,
    "post accumulate": PostAccumulateHook,
    "multi grad": MultiGradHook,
    "multi grad, any": AnyGradHook,
    "node": NodeHook,
}


@in_each_mode(table(HOOKS_ON_PARAMETERS))
def test_a_hook_on_a_parameter_runs_once_with_the_whole_gradient(case, gradients, scale):
    case.check(gradients, scale)
    assert len(case.expected(scale)["attributes of "]["seen"]) <= 1


# --- parameters that forward edits ----------------------------------------------------------------


class MaxNormAssigned(Hidden):
    def forward(self, pose):
        self.hidden.weight.data = torch.renorm(self.hidden.weight.data, 2, 0, 0.5)
        return super().forward(pose)


class MaxNormOfTheReadout(Hidden):
    """The graph of each pose needs this weight in backward."""

    def forward(self, pose):
        self.readout.weight.data = torch.renorm(self.readout.weight.data, 2, 0, 0.5)
        return super().forward(pose)


class MaxNormOfSomePoses(Hidden):
    """Only the poses after the first see the edited weight."""

    n_runs = 0

    def forward(self, pose):
        self.n_runs += 1
        if self.n_runs == 2:
            self.hidden.weight.data = torch.renorm(self.hidden.weight.data, 2, 0, 0.2)
        return super().forward(pose)


class Clipped(Hidden):
    def forward(self, pose):
        self.hidden.weight.data.clamp_(-0.3, 0.3)
        return super().forward(pose)


class ClippedWithoutGrad(Hidden):
    def forward(self, pose):
        with torch.no_grad():
            self.hidden.weight.clamp_(-0.3, 0.3)
        return super().forward(pose)


class Binarized(Hidden):
    def forward(self, pose):
        self.hidden.weight.data = self.hidden.weight.data.sign()
        return super().forward(pose)


class Rounded(Hidden):
    def forward(self, pose):
        with torch.no_grad():
            self.hidden.weight.mul_(8).round_().div_(8)
        return super().forward(pose)


class Standardized(Hidden):
    def forward(self, pose):
        weight = self.hidden.weight.data
        self.hidden.weight.data = (weight - weight.mean()) / weight.std()
        return super().forward(pose)


class ActNorm(Hidden):
    """Sets its scale and shift to those of the first pose."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(()))
        self.initialized = False

    def forward(self, pose):
        if not self.initialized:
            self.initialized = True
            self.initialize(pose)
        return super().forward((pose + self.shift) * self.scale)

    def initialize(self, pose):
        self.shift.data = -pose.mean().expand(3).clone()
        self.scale.data.copy_(1 / pose.std())


class ActNormWithABuffer(ActNorm):
    def __init__(self):
        super().__init__()
        del self.initialized
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, pose):
        if not self.initialized:
            self.initialized.fill_(True)
            self.initialize(pose)
        return Hidden.forward(self, (pose + self.shift) * self.scale)


class ActNormInPlace(ActNormWithABuffer):
    def initialize(self, pose):
        with torch.no_grad():
            self.scale.div_(pose.std())


class Decayed(Hidden):
    def forward(self, pose):
        self.hidden.weight.data.mul_(0.99)
        return super().forward(pose)


class DecayedWithoutGrad(Hidden):
    def forward(self, pose):
        with torch.no_grad():
            self.hidden.weight.mul_(0.99)
        return super().forward(pose)


class DecayedBehindZeros(Decayed):
    """The predictions do not depend on the edited weight, and the gradients do."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.readout.weight)


class DecayedAndAssigned(DecayedBehindZeros):
    def forward(self, pose):
        self.hidden.weight.data = self.hidden.weight.data * 0.99
        return Hidden.forward(self, pose)


class Swapped(DecayedBehindZeros):
    def forward(self, pose):
        self.hidden.weight.data = self.hidden.weight.data.flip(0)
        return Hidden.forward(self, pose)


def embedding():
    return nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), nn.Flatten(0), nn.Linear(12, 1))


class EmbeddingsAndBag(nn.Module):
    def __init__(self):
        super().__init__()
        self.atoms = nn.Embedding(6, 4, max_norm=0.5, norm_type=1.0)
        self.groups = nn.EmbeddingBag(6, 4, max_norm=0.5)
        self.readout = nn.Linear(4, 1)

    def forward(self, pose):
        return self.readout(torch.tanh(self.atoms(pose).sum(0) * self.groups(pose[None])[0]))


def numbers():
    return list(torch.randint(0, 6, (5, 3)))


REPEATED_EDITS_CHANGE_NOTHING = {
    "max norm, assigned": MaxNormAssigned,
    "max norm of the readout": MaxNormOfTheReadout,
    "clipped": Clipped,
    "clipped under no_grad": ClippedWithoutGrad,
    "binarized": Binarized,
    "rounded": Rounded,
    "actnorm": ActNorm,
    "actnorm with a buffer": ActNormWithABuffer,
}
REPEATED_EDITS_CHANGE_MORE = {
    "max norm of some poses": MaxNormOfSomePoses,
    "standardized": Standardized,  # up to rounding
    "actnorm in place": ActNormInPlace,
    "decayed": Decayed,
    "decayed under no_grad": DecayedWithoutGrad,
    "decayed behind zeros": DecayedBehindZeros,
    "decayed, assigned": DecayedAndAssigned,
    "rows swapped": Swapped,
}
BLAMES_NOBODY = {"not_in_message": "optimizer's step"}


@in_each_mode(
    table(REPEATED_EDITS_CHANGE_NOTHING, **BLAMES_NOBODY),
    table({"Embedding": embedding, "EmbeddingBag": EmbeddingsAndBag}, poses=numbers),
    table(REPEATED_EDITS_CHANGE_MORE, recomputed=RIGHT_OR_ERROR, **BLAMES_NOBODY),
)
def test_a_pose_model_may_edit_its_parameters(case, gradients, scale):
    case.check(gradients, scale)
