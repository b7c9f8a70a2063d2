"""Compare a batch of compounds with a loop over them, on copies of a combination."""

from __future__ import annotations

import copy
import dis
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mtenn_core._engine.autograd_nodes import is_batched, versions_of
from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import PoseInputs, combined_prediction
from mtenn_core._engine.plain_attributes import PlainAttributes
from mtenn_core._process.printable import error_text
from mtenn_core._process.settings import preserved_process_state
from mtenn_core._torch_internals import version_of
from mtenn_core.combination import Combination

_WEIGHTS = ("pose weights", "derivative of combine")


class CannotBatchError(Exception):
    """A combination cannot run in batches. The message is the reason."""


class DifferentNumbersError(CannotBatchError):
    """A batch gives other numbers than a loop over the compounds.

    Attributes
    ----------
    what : the number that differs
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"a batch gives a different {what}")
        self.what = what


def _first_difference(combination: Combination, predictions: Tensor, inputs: PoseInputs) -> str:
    """Return what differs between a batch of compounds and a loop over them; "" if nothing does.

    Two numbers are equal if half of their digits are. A batch may add numbers in another order, but
    a wrong rule for vmap gives other numbers altogether.

    Parameters
    ----------
    predictions, inputs : shape (n_compounds, n_poses); with columns, predictions have these, too

    Raises
    ------
    CannotBatchError : see :func:`check_can_batch`. This function does not compare ties.
    """
    _check_class(combination)
    # The loop runs first. A cache by the number of poses then keeps its tensors, and not those of
    # vmap, which nobody else can use.
    loop = _results_of_copy(from_rows, combination, predictions, inputs)
    try:
        # An operation without a rule for vmap warns in each call.
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            batch = _results_of_copy(_from_batch, combination, predictions, inputs)
    except (CannotBatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CannotBatchError(f"torch.func.vmap cannot run it: {error_text(error)}") from error
    if warned:
        raise CannotBatchError(f"torch.func.vmap warns: {warned[0].message}")
    finite = predictions[predictions.isfinite()].abs()
    size = float(finite.amax()) if len(finite) else 0.0
    for what, expected in loop.items():
        # Weights have no unit. The other numbers have at least the roundoff of the predictions.
        if not _close(batch[what], expected, 0.0 if what in _WEIGHTS else size):
            return what
    return ""


def check_can_batch(combination: Combination, predictions: Tensor, inputs: PoseInputs) -> None:
    """Check that a batch of compounds gives the numbers of a loop over them, also at ties.

    Parameters
    ----------
    predictions, inputs : shape (n_compounds, n_poses). The derivatives with respect to those inputs
        are compared that require a gradient.

    Raises
    ------
    DifferentNumbersError : the numbers differ
    CannotBatchError : the numbers differ only at ties; or the combination is stochastic, catches
        errors, changes attributes, buffers or predictions, or keeps a tensor; or vmap does not
        support it, as with control flow that depends on numbers
    """
    if what := _first_difference(combination, predictions, inputs):
        raise DifferentNumbersError(what)
    # The last call repeats the first. If a call changes the next one, the two differ.
    again = _rows(predictions, inputs, [0, -1, 0])
    values = _results_of_copy(from_rows, combination, *again)["value"]
    if not torch.equal(values[:1].nan_to_num(), values[2:].nan_to_num()):
        raise CannotBatchError("the same call gives different numbers")
    # vmap turns min() into amin(dim), which has another derivative at ties.
    tied = torch.arange(predictions.shape[1], device=predictions.device)
    rows = [predictions[0, tied // 2], predictions[0, 0 * tied]]
    if predictions.dim() > 2:  # ties within each pose, too
        rows += [each[:, :1].expand_as(each) for each in (predictions[0], rows[0])]
    ties = torch.stack(rows)
    try:
        what = _first_difference(combination, ties, _rows(predictions, inputs, [0] * len(rows))[1])
    except Exception as error:  # the author may refuse ties
        raise CannotBatchError(f"equal predictions are an error: {error_text(error)}") from error
    if what:
        raise CannotBatchError(
            "it gets another derivative at equal predictions (write amin() for min(), and amax()"
            " for max())"
        )


def _rows(
    predictions: Tensor, inputs: PoseInputs, places: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    return predictions[places], {name: numbers[places] for name, numbers in inputs.items()}


def _check_class(combination: Combination) -> None:
    """Raise a CannotBatchError if the class says already that it cannot run in batches."""
    if combination.stochastic:
        raise CannotBatchError("it is stochastic")
    if not overrides(type(combination), "combine"):
        raise CannotBatchError("it has no combine")
    if _catches_errors(type(combination)):
        # An error for one compound would change the results of all, and an error of vmap any.
        raise CannotBatchError("its code catches errors")


def _catches_errors(cls: type[Combination]) -> bool:
    """Return whether a method of a combination class has an ``except`` or a ``finally``."""
    own = [base for base in cls.__mro__ if base not in Combination.__mro__]
    members = [member for base in own for member in vars(base).values()]
    functions = [inspect.unwrap(getattr(m, "fget", getattr(m, "__func__", m))) for m in members]
    return any(map(_has_except, filter(None, (getattr(f, "__code__", None) for f in functions))))


def _has_except(code: CodeType) -> bool:
    names = [instruction.opname for instruction in dis.get_instructions(code)]
    # The end of a with block handles errors, too.
    n_handlers = names.count("PUSH_EXC_INFO") - names.count("WITH_EXCEPT_START")
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return n_handlers > 0 or any(map(_has_except, inner))


def _results_of_copy(
    run: Callable[..., Tensor], combination: Combination, predictions: Tensor, inputs: PoseInputs
) -> dict[str, Tensor]:
    """Return values and derivatives for some compounds, by their names.

    Parameters
    ----------
    run : :func:`_from_batch` or :func:`from_rows`
    """
    with torch.inference_mode(False), torch.enable_grad(), preserved_process_state():
        combination = copy.deepcopy(combination)
        attributes = PlainAttributes(combination.modules())
        state = _state(combination)
        own: dict[str, Tensor] = {
            n: param for n, param in combination.named_parameters() if param.requires_grad
        }
        inputs = {n: i.detach().clone().requires_grad_(i.requires_grad) for n, i in inputs.items()}
        own |= {f"pose_inputs[{n!r}]": each for n, each in inputs.items() if each.requires_grad}
        results, made = {}, _Results()
        for closed_form, name_of_weights in zip((True, False), _WEIGHTS, strict=True):
            function = partial(combined_prediction, closed_form=closed_form)
            y = predictions.clone().requires_grad_()
            given = y.clone()
            with made:
                values = run(function, combination, given, inputs)
            if version_of(given):
                raise CannotBatchError("it changes the predictions in place")
            # Not as grad_outputs: torch would import sympy to compare the shapes, half a second.
            factors = torch.arange(1, values.numel() + 1, device=values.device).view_as(values)
            gradients = torch.autograd.grad(
                (factors * values).sum(),
                [y, *own.values()],
                allow_unused=True,
                materialize_grads=True,
            )
            results["value"] = values.detach()
            names = [name_of_weights, *(f"gradient of {name!r}" for name in own)]
            results |= dict(zip(names, gradients, strict=True))
            del values, given
        if attributes.move() or _state(combination) != state:
            raise CannotBatchError("a call changes its attributes, parameters or buffers")
        if made.kept():
            raise CannotBatchError("a call keeps a tensor for later calls")
        return results


class _Results(TorchFunctionMode):
    """A mode that notes the results of all operations, to find those that somebody keeps."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._noted.append(weakref.ref(result))
        return result

    def kept(self) -> bool:
        """Return whether somebody still keeps a tensor of vmap."""
        alive = [tensor for ref in self._noted if (tensor := ref()) is not None]
        return any(map(is_batched, alive))


def _from_batch(
    function: Callable[..., Tensor],
    combination: Combination,
    predictions: Tensor,
    inputs: PoseInputs,
) -> Tensor:
    return function(combination, predictions, inputs)


def from_rows(
    function: Callable[..., Tensor],
    combination: Combination,
    predictions: Tensor,
    inputs: PoseInputs,
) -> Tensor:
    """Return the results of a function for some compounds, one after the other."""
    return torch.stack([function(combination, *row) for row in rows_of(predictions, inputs)])


def rows_of(predictions: Tensor, inputs: PoseInputs) -> Iterator[tuple[Tensor, PoseInputs]]:
    """Yield the predictions and the pose inputs of each compound of a batch."""
    for row, *own in zip(predictions, *inputs.values(), strict=True):
        yield row, dict(zip(inputs, own, strict=True))


def _state(combination: Combination) -> list[tuple[str, int, int]]:
    """Return name, identity and version of all parameters and buffers."""
    tensors = dict(combination.named_parameters()) | dict(combination.named_buffers())
    versions = versions_of(tensors.values())
    return list(zip(tensors, map(id, tensors.values()), versions, strict=True))


def _close(found: Tensor, expected: Tensor, size: float) -> bool:
    largest = float(expected.abs().nan_to_num(0.0, 0.0, 0.0).amax())
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * (largest + size)
    return torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)
