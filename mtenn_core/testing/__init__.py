"""Checks that a combination's gradient is the derivative of its value.

One list, :data:`CHECKS`, serves every front: the registry's gate, ``mtenn check`` and
:func:`check_combination`.

>>> from mtenn_core.testing import check_combination
>>> report = check_combination(MyCombination(pred_scale=10.0))
>>> assert report.passed, report
"""

from mtenn_core.testing._check import Check
from mtenn_core.testing._checks import CHECKS
from mtenn_core.testing._report import Record, Report
from mtenn_core.testing._runner import check_combination

__all__ = ["CHECKS", "Check", "Record", "Report", "check_combination"]
