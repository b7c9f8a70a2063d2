"""Errors of mtenn-core: one base class, and one class per thing that a caller can do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtenn_core._registry import PluginRecord
    from mtenn_core.testing import Report


class MtennError(Exception):
    """Base of every error that mtenn-core raises on purpose."""


class PredictionError(MtennError, ValueError):
    """Poses or their predictions cannot be combined: correct the input or the pose model.

    Attributes
    ----------
    pose : index of the pose in the call, or None
    compound : index of the compound in the call, or None
    """

    def __init__(
        self, message: str, *, pose: int | None = None, compound: int | None = None
    ) -> None:
        super().__init__(message)
        self.pose = pose
        self.compound = compound


class GradientError(MtennError, ValueError):
    """Gradients do not fit, or a mode would lose them: correct the ``grad_dict``, or the mode.

    Attributes
    ----------
    parameter : name of the parameter, or None
    pose : index of the pose, or None
    """

    def __init__(
        self, message: str, *, parameter: str | None = None, pose: int | None = None
    ) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.pose = pose


class DoubleBackwardError(MtennError, RuntimeError):
    """A second derivative was asked for of a gradient that was put together: use ``"graph"``."""


class ChangedBeforeBackwardError(MtennError, RuntimeError):
    """A pose cannot be run again as it was: call backward before you change what it depends on."""


class CheckpointError(MtennError, RuntimeError):
    """The checkpoint is of another combination: make the model with that one."""


class CombinationContractError(MtennError, TypeError):
    """A combination returned what its contract does not allow: tell its author."""


class PluginWarning(RuntimeWarning):
    """A plugin left traces or has another version, or a setting names none; it was done anyway."""


class TargetError(MtennError, LookupError):
    """What ``mtenn check`` was given cannot be imported: correct the path."""


class RegistryError(MtennError):
    """Base of the registry's errors.

    Attributes
    ----------
    record : the plugin that the error is about, or None
    """

    def __init__(self, message: str, *, record: PluginRecord | None = None) -> None:
        super().__init__(message)
        self.record = record


class CombinationNotFoundError(RegistryError, LookupError):
    """No installed plugin has this name: correct the name or install the plugin."""


class CombinationConflictError(RegistryError):
    """Several plugins have this name: ask for ``distribution:name``, or prefer one."""


class CombinationDisabledError(RegistryError, LookupError):
    """The plugin is installed and not allowed: allow it, or take another."""


class PluginPinError(RegistryError):
    """The plugin is not the one that was pinned: install that one, or pin this one."""


class PluginIncompatibleError(RegistryError):
    """The plugin was made for another version of mtenn-core: update one of the two."""


class PluginLoadError(RegistryError, ImportError):
    """The plugin could not be imported: repair or uninstall it."""


class PluginSpecError(RegistryError, TypeError):
    """The plugin was imported and does not keep the hook's contract: tell its author."""


class GradientValidationError(RegistryError):
    """The combination's gradient is not the derivative of its value: do not train with it.

    Attributes
    ----------
    report : every check that ran, with both numbers of those that failed
    """

    def __init__(
        self,
        message: str,
        *,
        record: PluginRecord | None = None,
        report: Report | None = None,
    ) -> None:
        super().__init__(message, record=record)
        self.report = report
