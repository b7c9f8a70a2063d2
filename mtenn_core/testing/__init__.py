"""Checks that a combination is what it says, and its gradient the derivative of its value.

One list, :data:`CHECKS`, serves every front: the registry's gate, ``mtenn check``,
:func:`check_combination` and, under pytest, :class:`CombinationConformance`.

>>> from mtenn_core.testing import check_combination
>>> report = check_combination(MyCombination(pred_scale=10.0))
>>> assert report.passed, report
"""

from mtenn_core.testing._catalogue import CHECKS
from mtenn_core.testing._checks.check import LEVELS, Check
from mtenn_core.testing._pytest import CombinationConformance, parametrize_with_checks
from mtenn_core.testing._report import SUITE_VERSION, Record, Report
from mtenn_core.testing._runner import check_combination

__all__ = [
    "CHECKS",
    "LEVELS",
    "SUITE_VERSION",
    "Check",
    "CombinationConformance",
    "Record",
    "Report",
    "check_combination",
    "parametrize_with_checks",
]
