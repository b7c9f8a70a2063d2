"""Every small mistake in a shipped plugin is seen by the conformance suite, or nobody can see it.

The mistakes are made by a machine, so that their authors and the suite's are not the same.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from functools import cache
from pathlib import Path

import pytest

from mtenn_core.testing import CHECKS, check_combination

ROOT = Path(__file__).parents[2]
# By its path, since no folder of tests is a package.
_SPEC = importlib.util.spec_from_file_location("mutation", Path(__file__).parent / "mutation.py")
mutation = sys.modules["mutation"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(mutation)

PLUGINS = {
    name: importlib.util.find_spec(f"mtenn_{name}").origin
    for name in ("mean", "max", "boltzmann", "ordered")
}
SOURCES = {name: Path(path).read_text(encoding="utf-8") for name, path in PLUGINS.items()}
MUTANTS = {m.change: (name, m) for name in PLUGINS for m in mutation.mutants(SOURCES[name])}
ALL_CHECKS = [check.id for check in CHECKS]  # of every level

# What nobody can tell from the plugin itself: why, and which.
EQUIVALENT = {
    "at the ends of the range of the arithmetic, the value has reached its limit": [
        "MaxCombination._scale_and_growth: 1 -> 2",
        "BoltzmannCombination._kT_within_range: 1 -> 2",
    ],
    "min and max take their arguments in any order": [
        "MaxCombination._scale_and_growth: max(self._pred_scale, 1 / highest)"
        " -> max(1 / highest, self._pred_scale)",
        "MaxCombination._scale_and_growth: min(max(self._pred_scale, 1 / highest), highest)"
        " -> min(highest, max(self._pred_scale, 1 / highest))",
        "TopKMeanCombination.reference: min(self.k, len(predictions))"
        " -> min(len(predictions), self.k)",
        "TopKMeanCombination._ranks: min(self.k, n_poses) -> min(n_poses, self.k)",
        "BoltzmannCombination._kT_within_range: max(self._kT, 1 / highest)"
        " -> max(1 / highest, self._kT)",
        "BoltzmannCombination._kT_within_range: min(max(self._kT, 1 / highest), highest)"
        " -> min(highest, max(self._kT, 1 / highest))",
    ],
    "isclose takes its arguments in any order": [
        "QuantileCombination._ranks: math.isclose(rank, round(rank), rel_tol=1e-15)"
        " -> math.isclose(round(rank), rank, rel_tol=1e-15)",
    ],
    "a tolerance of a few roundings may be twice as large": [
        "QuantileCombination._ranks: 1e-15 -> 2e-15",
    ],
    "a difference is NaN if one of its operands is": [
        "MaxCombination._exponents: wide.nan_to_num(nan=math.nan) -> wide.nan_to_num()",
        "MaxCombination._exponents: extreme.detach().nan_to_num(nan=math.nan)"
        " -> extreme.detach().nan_to_num()",
        "BoltzmannCombination._populations: wide.nan_to_num(nan=math.nan) -> wide.nan_to_num()",
        "BoltzmannCombination._populations: lowest.detach().nan_to_num(nan=math.nan)"
        " -> lowest.detach().nan_to_num()",
    ],
    "promote_types takes its arguments in any order": [
        "MaxCombination._exponents: torch.promote_types(predictions.dtype, torch.float32)"
        " -> torch.promote_types(torch.float32, predictions.dtype)",
        "BoltzmannCombination._populations: torch.promote_types(predictions.dtype, torch.float32)"
        " -> torch.promote_types(torch.float32, predictions.dtype)",
    ],
}
# What the suite cannot know: why, the test of the plugin that sees it, and which.
BEYOND_THE_SUITE = {
    "a default, and the meaning of an argument, are said in words alone": {
        "test_worked_by_hand": [
            "MaxCombination.__init__: False -> True",
            "MaxCombination.__init__: 1.0 -> 2.0",
            "MaxCombination.__init__: False -> True #2",
            "MinCombination.__init__: 1.0 -> 2.0",
            "MinCombination.__init__: False -> True",
            "BoltzmannCombination.__init__: 1.0 -> 2.0",
            "TopKMeanCombination.__init__: 3 -> 4",
            "TopKMeanCombination.__init__: False -> True",
            "QuantileCombination.__init__: 0.25 -> 0.5",
        ],
        "test_a_fixed_scale_is_no_parameter": [
            "MaxCombination.__init__: False -> True #3",
            "MinCombination.__init__: False -> True #2",
        ],
        "test_a_learned_scale_shows_as_it_is_now": [
            "MaxCombination.__init__: math.log(scale) -> math.exp(scale)",
            "MaxCombination.extra_repr: re.sub('pred_scale=[^,]*', now, arguments)"
            " -> re.sub('pred_scale=[^,]*', arguments, now)",
        ],
        "test_a_fixed_temperature_is_no_parameter": [
            "BoltzmannCombination.__init__: False -> True",
        ],
        "test_arguments_show_and_survive_copies": [
            "BoltzmannCombination.__init__: math.log(number) -> math.exp(number)",
        ],
    },
    "any error is enough for a bad argument, also one from a later call": {
        "test_a_quantile_outside_of_zero_to_one_is_refused": [
            "QuantileCombination.__init__: 1 -> 2",
            "QuantileCombination.__init__: raise ValueError(f'q must be between 0 and 1; found q ="
            " {q!r}') -> pass",
        ],
    },
    "no number of poses of a probe gives a rank that is nearly whole": {
        "test_a_rank_that_is_whole_but_for_rounding_is_whole": [
            "QuantileCombination._ranks: rank = round(rank) -> pass",
        ],
        "test_a_rank_just_above_a_whole_one_is_not_whole": [
            "QuantileCombination._ranks: math.isclose(rank, round(rank), rel_tol=1e-15)"
            " -> math.isclose(rank, round(rank))",
        ],
    },
    "what a combination shows once it has been trained": {
        "test_a_learned_temperature_shows_as_it_is_now": [
            "BoltzmannCombination.extra_repr: if self.learnable and hasattr(self.log_kT,"
            " 'device_mesh'): -> if not (self.learnable and hasattr(self.log_kT, 'device_mesh')):",
        ],
    },
    "the core calls combine and pose_weights in float32 at least": {
        "test_half_precision_is_that_of_float32_rounded_once": [
            "MaxCombination.combine: value.to(predictions.dtype) -> value",
            "MaxCombination.pose_weights: (factors / factors.sum()).to(predictions.dtype)"
            " -> factors / factors.sum()",
            "MaxCombination._exponents:"
            " predictions.to(torch.promote_types(predictions.dtype, torch.float32))"
            " -> predictions",
            "BoltzmannCombination.combine:"
            " (lowest + (populations * above).sum()).to(predictions.dtype)"
            " -> lowest + (populations * above).sum()",
            "BoltzmannCombination.pose_weights:"
            " (populations * (1 + (mean - above) / kT)).to(predictions.dtype)"
            " -> populations * (1 + (mean - above) / kT)",
            "BoltzmannCombination._populations:"
            " predictions.to(torch.promote_types(predictions.dtype, torch.float32))"
            " -> predictions",
        ],
    },
    "no probe is infinite, or overflows": {
        "test_the_mean_of_large_predictions_does_not_overflow": [
            "MeanCombination.combine: torch.where(mean.isfinite(), mean,"
            " (predictions / n_poses).sum()) -> torch.where(mean.isfinite(),"
            " (predictions / n_poses).sum(), mean)",
            "MeanCombination.combine: predictions / n_poses -> predictions * n_poses",
            "MeanCombination.combine: (predictions / n_poses).sum()"
            " -> (predictions / n_poses).mean()",
        ],
        "test_the_mean_of_whole_numbers_is_exact": [
            "MeanCombination.combine: mean.isfinite() -> mean.isnan()",
        ],
        "test_a_failed_pose_counts_as_absent": [
            "BoltzmannCombination._populations: above = above.clamp(max=FAR * kT) -> pass",
            "BoltzmannCombination._populations: FAR * kT -> FAR / kT",
        ],
    },
    "no example is at the end of the range of floating-point numbers": {
        "test_a_scale_that_underflows_gives_the_mean_if_normalized": [
            "MaxCombination._scale_and_growth: 1 -> 0",
        ],
        "test_a_learned_scale_has_a_finite_derivative_everywhere": [
            "MaxCombination._scale_and_growth: log_scale.detach() -> log_scale",
        ],
        "test_a_scale_that_overflows_gives_the_hard_extreme": [
            "MaxCombination._scale_and_growth: torch.finfo(dtype).max / FAR"
            " -> torch.finfo(dtype).max * FAR",
        ],
        "test_a_vanishing_temperature_gives_the_minimum": [
            "BoltzmannCombination._kT_within_range: 1 -> 0",
        ],
        "test_an_infinite_temperature_gives_the_mean": [
            "BoltzmannCombination._kT_within_range: torch.finfo(dtype).max / WIDE"
            " -> torch.finfo(dtype).max * WIDE",
        ],
        "test_a_float32_scale_is_computed_in_the_dtype_of_the_predictions": [
            "MaxCombination._scale_and_growth: self.log_pred_scale.to(dtype)"
            " -> self.log_pred_scale",
        ],
        "test_a_float32_temperature_is_computed_in_the_dtype_of_the_predictions": [
            "BoltzmannCombination._kT_within_range: self.log_kT.to(dtype) -> self.log_kT",
        ],
    },
}
NOBODY_SEES = {change for changes in EQUIVALENT.values() for change in changes}
OWN_TEST_SEES = {
    change: test
    for tests in BEYOND_THE_SUITE.values()
    for test, changes in tests.items()
    for change in changes
}


class Seen(Exception):
    """Ends a run of the suite at its first failure."""


def stop_at_failure(record):
    if record.failed:
        raise Seen(record.id)


def seen_by_the_suite(name, mutant):
    """Return what gives a mutant away, on all examples of each class that has the mistake."""
    try:
        with mutant.imported(PLUGINS[name]) as module:
            for cls in mutation.subclasses(module, mutant.owner):
                for arguments in cls.examples:
                    check_combination(cls(**arguments), only=ALL_CHECKS, on_record=stop_at_failure)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def seen_by_the_test(name, mutant, test):
    """Return whether a test of the plugin's own fails for a mutant."""
    with mutant.imported(PLUGINS[name]) as module, pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, f"mtenn_{name}", module)
        tests = {"__name__": "tests_of_a_mutant"}
        exec(compiled_tests(name), tests)
        try:
            for arguments in arguments_of(tests[test]):
                tests[test](**arguments)
        except (Exception, pytest.fail.Exception):
            return True
    return False


@cache
def compiled_tests(name):
    path = ROOT / "plugins" / f"mtenn-{name}" / "tests" / f"test_{name}.py"
    return compile(path.read_text(encoding="utf-8"), path, "exec")


def arguments_of(test):
    """Yield the arguments that pytest would call a test with."""
    marks = [mark.args for mark in getattr(test, "pytestmark", ())]
    for values in itertools.product(*(values for _, values in marks)):
        yield dict(zip((name for name, _ in marks), values, strict=True))


@pytest.mark.slow("the tests of each plugin run the same checks")
@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_itself_passes(name):
    for mutant in mutation.unchanged(SOURCES[name]):
        assert seen_by_the_suite(name, mutant) == ""


def every_mutant():
    """Yield all mistakes; the fast tier takes every sixth, and none that costs a whole suite."""
    slow = pytest.mark.slow("a sixth of the mistakes is enough to see that mistakes are seen")
    for i, change in enumerate(MUTANTS):
        quick = i % 6 == 0 and change not in NOBODY_SEES and change not in OWN_TEST_SEES
        yield pytest.param(change, id=change, marks=() if quick else slow)


@pytest.mark.parametrize("change", [*every_mutant()])
def test_the_suite_sees_what_is_not_listed(change):
    seen = seen_by_the_suite(*MUTANTS[change])
    if change in NOBODY_SEES or change in OWN_TEST_SEES:
        assert not seen, f"take it off the list: the suite sees it, {seen}"
    else:
        assert seen, "no check fails: mend the suite or the plugin, or list it with the reason"


@pytest.mark.parametrize("change", OWN_TEST_SEES, ids=str)
def test_what_the_suite_cannot_know_the_plugin_tests(change):
    name, mutant = MUTANTS[change]
    (right, *_) = mutation.unchanged(SOURCES[name])
    assert not seen_by_the_test(name, right, OWN_TEST_SEES[change])
    assert seen_by_the_test(name, mutant, OWN_TEST_SEES[change])


def test_what_is_listed_is_made():
    assert sorted({*NOBODY_SEES, *OWN_TEST_SEES} - set(MUTANTS)) == []
