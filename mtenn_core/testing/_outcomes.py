"""The measured numbers of a check, and the exceptions that end a check without a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from mtenn_core.testing._report import Status

if TYPE_CHECKING:
    from mtenn_core.testing._probe.poses import Poses

Metrics = dict[str, Any]


class Outcome(Exception):
    """The exception that ends a check whose status is not ``"pass"``.

    Attributes
    ----------
    status : status of the record
    cause : the likely mistake, or the code that removes a hazard, or ""
    metrics : numbers that the check measured
    poses : the poses whose weights are wrong, for the plots, or None
    """

    status: ClassVar[Status]

    def __init__(
        self, reason: str, *, cause: str = "", poses: Poses | None = None, **metrics: Any
    ) -> None:
        super().__init__(reason)
        self.cause = cause
        self.poses = poses
        self.metrics = metrics


class Fail(Outcome):
    """The combination breaks the rule of the check."""

    status = "fail"


class Advice(Outcome):
    """A hazard for the users of a combination that keeps the contract.

    The reason describes the hazard and the numbers. ``cause`` is the code that removes it.
    """

    status = "advice"


class Skip(Outcome):
    """The check does not apply to the combination."""

    status = "skip"


class Inconclusive(Outcome):
    """The numerical derivative is too uncertain to decide."""

    status = "inconclusive"
