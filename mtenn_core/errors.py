"""Errors of mtenn-core: one base class, and one class for each possible reaction of a caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtenn_core._registry import PluginRecord
    from mtenn_core.testing import Report


class MtennError(Exception):
    """Base class of all errors that mtenn-core raises on purpose."""


class PredictionError(MtennError, ValueError):
    """Poses or predictions cannot be combined. Correct the input or the pose model.

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


class TableError(MtennError, ValueError):
    """A table of poses cannot be read, or a result cannot be written. Correct the file.

    Attributes
    ----------
    path : the file, or None
    place : the line of the file, counted from 1, or None. In a Parquet file, the row
    column : the name of the column, or None
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        place: int | None = None,
        column: str | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.place = place
        self.column = column


class GradientError(MtennError, ValueError):
    """Gradients are malformed, or a mode would lose them. Correct the ``grad_dict`` or the mode.

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
    """A precomputed gradient has no gradient of its own. Use ``gradients="graph"``."""


class ChangedBeforeBackwardError(MtennError, RuntimeError):
    """A pose cannot run again because the model or the pose changed. Call backward earlier."""


class TorchVersionError(MtennError, RuntimeError):
    """The installed torch lacks an interface. Use what the message names, or another torch."""


class CheckpointError(MtennError, RuntimeError):
    """The checkpoint belongs to another combination. Make the model with that combination."""


class CombinationContractError(MtennError, TypeError):
    """A combination breaks the contract of combinations. Tell its author."""


class PluginWarning(RuntimeWarning):
    """A plugin or a setting has a problem, but the operation succeeded.

    For example, a plugin changed global state, its version differs from the imported one, or a
    setting matches no plugin.
    """


class DirectionWarning(UserWarning):
    """Predictions look like pIC50, but the combination prefers the lowest one. It is only a hint.

    If lower is better for your predictions, ignore it:
    ``warnings.filterwarnings("ignore", category=DirectionWarning)``
    """


class TargetError(MtennError, LookupError):
    """A target of ``mtenn check`` cannot be imported. Correct the path."""


class RegistryError(MtennError):
    """Base class of the registry's errors.

    Attributes
    ----------
    record : the plugin that the error is about, or None
    """

    def __init__(self, message: str, *, record: PluginRecord | None = None) -> None:
        super().__init__(message)
        self.record = record


class CombinationNotFoundError(RegistryError, LookupError):
    """No installed plugin has this name. Correct the name or install the plugin."""


class CombinationConflictError(RegistryError):
    """Several plugins have this name. Ask for ``distribution:name``, or prefer one plugin."""


class CombinationDisabledError(RegistryError, LookupError):
    """The plugin is installed but not allowed. Allow it, or use another plugin."""


class PluginPinError(RegistryError):
    """The plugin differs from the pinned plugin. Install the pinned plugin, or pin this one."""


class PluginIncompatibleError(RegistryError):
    """The plugin requires another version of mtenn-core. Update the plugin or mtenn-core."""


class PluginLoadError(RegistryError, ImportError):
    """The plugin cannot be imported. Repair or uninstall it."""


class PluginSpecError(RegistryError, TypeError):
    """The plugin was imported but breaks the contract of the hook. Tell its author."""


class GradientValidationError(RegistryError):
    """The combination's gradient is not the derivative of its value. Do not train with it.

    Attributes
    ----------
    report : the results of all checks; failed checks contain both numbers
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
