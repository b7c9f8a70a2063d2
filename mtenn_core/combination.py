"""The base class of all combinations. A combination can be written at three depths."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from mtenn_core.errors import CombinationContractError
from mtenn_core.gradients import GradDict, attach_gradients, join_grad_dict, split_grad_dict
from mtenn_core.hookspecs import hookimpl

InputKind = Literal["real", "positive", "label"]

if TYPE_CHECKING:
    _Method = TypeVar("_Method", bound=Callable[..., Any])

    def _typed_as(method: _Method, /) -> Callable[[Callable[..., Any]], _Method]:
        """Return a decorator for ``__call__``: type checkers then see the signature of ``method``.

        In torch, the result of ``__call__`` is Any.
        """
        ...


# The engine imports this class, and some methods of this class use the engine. These methods import
# the engine when they are called.


class _ConstructorSignature(inspect.Signature):
    """The attribute ``__signature__`` of a class whose ``__new__`` takes ``*args, **kwargs``.

    ``inspect.signature``, ``help`` and Sphinx show ``__new__``, unless a class has this attribute.
    It is a signature itself, because ``functools.wraps(cls)`` copies it to a function.
    """

    def __init__(self) -> None:
        kinds = inspect.Parameter
        super().__init__([kinds("args", kinds.VAR_POSITIONAL), kinds("kwargs", kinds.VAR_KEYWORD)])

    def __get__(self, instance: object, owner: type[torch.nn.Module]) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("only the class has __signature__")  # a call is another signature
        from mtenn_core._engine.declarations import constructor_signature  # needs Combination

        return constructor_signature(owner)


class Combination(torch.nn.Module):
    """A rule h that makes one prediction h(ŷ_1 … ŷ_M) from the predictions for a compound's poses.

    Write :meth:`combine`; everything else follows from it. Add :meth:`pose_weights` if you know the
    derivative in closed form. Override :meth:`forward` for full control. A combination may have its
    own parameters and buffers, like any module.

    Attributes
    ----------
    min_poses : the smallest number of poses that the combination accepts
    domain : the open interval in which predictions may lie
    smooth : False if the value has kinks (median, top-k). Checks then avoid equal predictions.
    stochastic : True if ``combine`` draws random numbers. Checks then repeat the same numbers.
    properties : claims that the conformance suite checks, such as ``"permutation_invariant"``
    examples : dicts of constructor arguments; the checks run with each of them
    pose_inputs : names of further numbers per pose, such as ``("docking_score",)``. The caller
        passes the numbers in ``model(poses, pose_inputs={"docking_score": …})``. ``combine``,
        ``pose_weights`` and ``reference`` receive them by name, as in
        ``combine(self, predictions, docking_score)``. A dict also gives the kind of each:
        ``{"strain": "real", "degeneracy": "positive", "chain": "label"}``. ``"real"`` is any
        finite number, ``"positive"`` a number above 0, and ``"label"`` a whole number from 0 on.
        Other numbers are then an error, and the checks use numbers of this kind.
    pose_columns : None if ``combine`` takes one number per pose, shape (n_poses,). If it takes
        several, shape (n_poses, n_columns): their number, a tuple of their names, or ``"any"``.
        ``__init__`` may set it, for example from an argument. ``combine`` then returns shape () or
        a vector, which has the same shape for every compound. Such a class cannot override
        ``forward``.
    """

    min_poses: ClassVar[int] = 1
    domain: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    smooth: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    properties: ClassVar[frozenset[str]] = frozenset()
    examples: ClassVar[Sequence[dict[str, Any]]] = ({},)
    pose_inputs: ClassVar[tuple[str, ...] | Mapping[str, InputKind]] = ()
    pose_columns: int | str | tuple[str, ...] | None = None

    if TYPE_CHECKING:  # staticmethod[…] is an error when it is evaluated
        split_grad_dict: ClassVar[staticmethod[[GradDict], tuple[list[str], list[Tensor]]]]
        join_grad_dict: ClassVar[
            staticmethod[[Sequence[str], Sequence[Tensor]], dict[str, list[Tensor]]]
        ]

    split_grad_dict = staticmethod(split_grad_dict)
    join_grad_dict = staticmethod(join_grad_dict)

    __signature__: ClassVar[_ConstructorSignature] = _ConstructorSignature()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if cls.combine is Combination.combine and cls.forward is Combination.forward:
            raise TypeError(
                f"{cls.__name__} cannot be instantiated: it must define combine(predictions),"
                " or forward(pred_list, grad_dict, param_names, *model_params)"
            )
        if kwargs:
            from mtenn_core._engine.declarations import check_argument_names  # needs this class

            check_argument_names(cls, kwargs)
        combination = super().__new__(cls)
        # Write to __dict__, because torch's __setattr__ works only after __init__.
        combination.__dict__["_arguments"] = args, kwargs
        return combination

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The method would take the predictions for several compounds for those for one. It may come
        # from a mixin.
        own = inspect.getattr_static(cls, "pose_weights")
        is_checked = own is Combination.pose_weights or hasattr(own, "refuses_several")
        if inspect.isfunction(own) and not is_checked:
            from mtenn_core._engine.evaluation import of_one_compound  # needs this class

            cls.pose_weights = of_one_compound(own)  # type: ignore[method-assign]
        if inspect.isfunction(init := vars(cls).get("__init__")):
            cls.__init__ = _initializing_module(init)  # type: ignore[method-assign]

    @classmethod
    @hookimpl
    def mtenn_combination(cls) -> type[Self]:
        """Return this class. Every combination is a plugin (see :mod:`mtenn_core.hookspecs`)."""
        return cls

    def extra_repr(self) -> str:
        """Return the constructor's arguments, for ``repr``."""
        from mtenn_core._engine.declarations import constructor_arguments  # needs this class

        shown = constructor_arguments(self, defaults=True)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    if TYPE_CHECKING:  # torch's own accepts any argument

        def __init__(self) -> None: ...

    # With *args: Any and **kwargs: Any at the end, type checkers accept subclasses that name their
    # pose inputs there. The same holds for forward.
    def combine(self, predictions: Tensor, *args: Any, **pose_inputs: Any) -> Tensor:
        """Return the combined prediction h, differentiable by autograd.

        Parameters
        ----------
        predictions : shape (n_poses,), or (n_poses, n_columns) with ``pose_columns``; float32 or
            wider when the core calls this method
        **pose_inputs : one tensor for each name in ``pose_inputs``, shape (n_poses,), with the
            dtype and device of ``predictions``

        Returns
        -------
        shape (), in the unit, dtype and device of ``predictions``; with ``pose_columns`` shape ()
        or (n_results,)
        """
        raise CombinationContractError(
            f"{type(self).__name__} defines only forward and has no combine(predictions)"
        )

    def pose_weights(self, predictions: Tensor, *args: Any, **pose_inputs: Any) -> Tensor:
        """Return ∂h/∂ŷ_i for every pose.

        If you override this method with the closed form, training uses the closed form. This
        implementation derives the weights from :meth:`combine` by autograd. If there is no
        ``combine``, it derives them from the backward of :meth:`forward`. Do not override it if
        ``combine`` returns a vector. Then training uses autograd, and this implementation raises an
        error.

        Parameters
        ----------
        predictions, **pose_inputs : as for :meth:`combine`

        Returns
        -------
        the shape, dtype and device of ``predictions``

        Raises
        ------
        PredictionError : ``predictions`` has the predictions for several compounds
        CombinationContractError : the result of ``combine`` is a vector
        """
        from mtenn_core._engine.evaluation import check_one_compound, derived_weights  # as above

        check_one_compound(self, predictions)
        return derived_weights(self, predictions, pose_inputs)

    def reference(self, predictions: Tensor, *args: Any, **pose_inputs: Any) -> Tensor:
        """Return the combined prediction from an independent formula. This method is optional.

        The conformance suite compares ``combine`` and its derivative with this formula. The formula
        may be simple and slow. Training does not use it.

        Parameters
        ----------
        predictions : float64, in the shape that :meth:`combine` takes
        **pose_inputs : as for :meth:`combine`

        Returns
        -------
        the shape of the result of :meth:`combine`
        """
        raise CombinationContractError(f"{type(self).__name__} declares no reference(predictions)")

    def forward(
        self,
        pred_list: list[Tensor],
        grad_dict: dict[str, list[Tensor]],
        param_names: list[str],
        *model_params: Any,
        **pose_inputs: Any,
    ) -> Tensor:
        """Return the combined prediction. Its backward uses the gradients of the poses.

        Parameters
        ----------
        pred_list, grad_dict, param_names, *model_params : see :func:`mtenn_core.attach_gradients`.
            With ``pose_columns``, each prediction has shape (n_columns,), and each gradient has one
            more dimension of n_columns before those of the parameter.
        **pose_inputs : as for :meth:`combine`

        Returns
        -------
        the shape of the result of :meth:`combine`; dtype and device of the predictions
        """
        from mtenn_core._engine.columns import split_columns
        from mtenn_core._engine.evaluation import combined_prediction  # needs this class

        if self.pose_columns is None:
            predictions = attach_gradients(pred_list, grad_dict, param_names, *model_params)
        else:
            n_columns, numbers, split = split_columns(pred_list, grad_dict, self.pose_columns)
            predictions = attach_gradients(numbers, split, param_names, *model_params)
            predictions = predictions.view(-1, n_columns)
        return combined_prediction(self, predictions, pose_inputs)

    if TYPE_CHECKING:

        @_typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def _initializing_module(init: Callable[..., None]) -> Callable[..., None]:
    """Return an ``__init__`` that raises an error if it does not call ``super().__init__()``.

    torch would raise an AttributeError about its own attributes, and most often much later.
    """

    @functools.wraps(init)
    def checked(self: Combination, *args: Any, **kwargs: Any) -> None:
        rule = f"{type(self).__name__}.__init__ must call super().__init__() first"
        try:
            init(self, *args, **kwargs)
        except AttributeError as error:
            if "training" not in vars(self):
                raise CombinationContractError(f"{rule}; found: {error}") from error
            raise
        if "training" not in vars(self) and vars(type(self).__init__).get("__wrapped__") is init:
            raise CombinationContractError(f"{rule}; found that it never does")

    return checked


def as_mtenn_combination(combination: Combination) -> torch.nn.Module:
    """Return a module that mtenn's ``GroupedModel`` takes as a combination (mtenn 0.6 and later).

    The module's ``forward(pred_list, grad_dict, param_names, *model_params)`` returns two tensors:
    the combined prediction, shape (), and the pose predictions, shape (n_poses,). Both are
    differentiable. Each prediction in ``pred_list`` may have any shape with one number. If
    ``grad_dict`` is empty, as at inference, the two tensors have no gradient. Frozen parameters of
    the combination are moved and saved with the module, but are not among its ``parameters()``.

    Raises
    ------
    TypeError : ``combination`` is no instance of :class:`Combination`
    ValueError : the combination needs pose inputs or takes several numbers per pose, or it has
        trainable parameters. ``GroupedModel`` passes on only one prediction per pose, and expects a
        gradient per pose for every trainable parameter.
    """
    from mtenn_core._engine.declarations import checked_instance  # needs Combination
    from mtenn_core._engine.mtenn_adapter import MtennCombination

    checked_instance(combination, "expected an instance of mtenn_core.Combination")
    trainable = [name for name, param in combination.named_parameters() if param.requires_grad]
    if trainable or combination.pose_inputs or combination.pose_columns is not None:
        what = f"trainable parameters {trainable}"
        if combination.pose_inputs:
            what = f"pose_inputs {tuple(combination.pose_inputs)}"
        elif combination.pose_columns is not None:
            what = f"pose_columns {combination.pose_columns!r}"
        raise ValueError(
            f"{type(combination).__name__} has {what}. mtenn's GroupedModel cannot handle them. Use"
            " mtenn_core.MultiPoseModel instead."
        )
    return MtennCombination(combination)
