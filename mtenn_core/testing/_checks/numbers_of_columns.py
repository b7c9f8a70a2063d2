"""Checks that run again with more columns, if the combination takes any number of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from mtenn_core._engine.columns import ANY
from mtenn_core.testing._outcomes import Metrics, Outcome, Skip
from mtenn_core.testing._probe.subject import Subject

# A rule may be right for the number of columns of the usual probes, and wrong for more.
MORE_COLUMNS = 5

Run = Callable[[Subject], Metrics]


def again_with_more_columns(run: Run) -> Run:
    """Return the function of a check that thorough checks run a second time, with more columns."""

    @wraps(run)
    def run_both(subject: Subject) -> Metrics:
        metrics = run(subject)
        if subject.thorough and subject.combination.pose_columns == ANY:
            _run_again(run, subject)
        return metrics

    return run_both


def _run_again(run: Run, subject: Subject) -> None:
    other = Subject(subject.original, subject.seed, thorough=True, n_columns=MORE_COLUMNS)
    try:
        run(other)
    except Skip:  # the first run has decided
        pass
    except Outcome as outcome:
        usual = subject.probes.shape(1)[-1]
        where = f"right for {usual} columns, wrong for {MORE_COLUMNS}"
        cause = "; ".join(filter(None, [outcome.cause, where]))
        raise type(outcome)(str(outcome), cause=cause, **outcome.metrics) from None
