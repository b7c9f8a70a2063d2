"""The conformance suite: checks of the contract, the value and the gradient of a combination.

The registry's gate, ``mtenn check``, :func:`check_combination` and, in pytest,
:class:`CombinationConformance` use the same list of checks, :data:`CHECKS`.

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
