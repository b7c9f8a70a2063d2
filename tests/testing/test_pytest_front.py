"""The suite as tests: each writes the test file of a plugin's author, and runs pytest on it."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from mtenn_core._pytest_plugin import ConformanceSummary
from mtenn_core.testing import CHECKS, CombinationConformance
from mtenn_core.testing._catalogue import chosen_checks

pytest_plugins = "pytester"

GATE = chosen_checks("gate")
FULL = chosen_checks("full")

RULES = """
    import torch
    from mtenn_core import Combination

    class Mean(Combination):
        def combine(self, predictions):
            return predictions.mean()

    class Wrong(Mean):
        def pose_weights(self, predictions):
            return 1.001 * super().pose_weights(predictions)

    class PowerMean(Combination):
        domain = (0.0, float("inf"))
        examples = ({"power": 2.0}, {"power": 3.0})

        def __init__(self, power):
            super().__init__()
            self.power = power

        def combine(self, predictions):
            return predictions.pow(self.power).mean().pow(1 / self.power)

    class NeedsArguments(PowerMean):
        examples = ({},)

    def cube():
        return PowerMean(3.0)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(pred_list, grad_dict, param_names, *model_params):
            return torch.stack(pred_list).mean()

        @staticmethod
        def setup_context(ctx, inputs, output):
            _, grad_dict, ctx.names, *_ = inputs
            ctx.keys, gradients = Combination.split_grad_dict(grad_dict)
            ctx.save_for_backward(*gradients)

        @staticmethod
        def backward(ctx, grad_output):
            grad_dict = Combination.join_grad_dict(ctx.keys, ctx.saved_tensors)
            sums = [grad_output * torch.stack(grad_dict[name]).mean(0) for name in ctx.names]
            return None, None, None, *sums

    class Advised(Combination):
        def forward(self, *args):
            return Function.apply(*args)
"""

HEAD = """
import pytest
from mtenn_core.testing import CombinationConformance, parametrize_with_checks
from rules import *
"""


@pytest.fixture
def pytest_on(pytester, monkeypatch):
    """Run pytest on a test file, with no plugin but ours; warnings are errors in it, too."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(rules=RULES)

    def run(tests, *args):
        pytester.makepyfile(test_rules=f"{HEAD}\n{tests}")
        return pytester.runpytest_inprocess("-Werror", "-pmtenn_core._pytest_plugin", *args)

    return run


def of_class(body, level="gate"):
    return f"class TestRule(CombinationConformance):\n    level = {level!r}\n    {body}\n"


def n_skipped(result):
    return result.parseoutcomes().get("skipped", 0)


def counted(result):
    """Return how many tests ended in which way, skips aside."""
    outcomes = result.parseoutcomes()
    outcomes.pop("skipped", None)
    return outcomes


def test_every_check_is_a_test_that_says_its_id_and_title():
    names = [name for name in dir(CombinationConformance) if name.startswith("test_")]
    assert len(names) == len(CHECKS) + 1
    assert "test_c1_pose_weights_are_the_derivative_of_the_value" in names
    for check in CHECKS:
        (name,) = [name for name in names if name.startswith(f"test_{check.id.lower()}_")]
        assert getattr(CombinationConformance, name).__doc__ == f"{check.id}: {check.title}."


def test_a_right_combination_passes_the_tests_of_its_level_and_no_others(pytest_on):
    result = pytest_on(of_class("combination = Mean"), "-v")
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] + outcomes["skipped"] == len(GATE) + 1
    assert set(outcomes) == {"passed", "skipped"}
    result.stdout.fnmatch_lines(
        [
            "*::TestRule::test_no_check_was_taken_out PASSED*",
            "*::TestRule::test_c1_pose_weights_are_the_derivative_of_the_value[[]Mean[]] PASSED*",
        ]
    )
    result.stdout.fnmatch_lines(
        [f"conformance: 1 combination, {len(GATE)} checks: {outcomes['passed'] - 1} passed, * *"]
    )


def test_the_default_is_the_full_suite(pytest_on):
    tests = "class TestMean(CombinationConformance):\n    combination = Mean"
    collected = str(pytest_on(tests, "--collect-only", "-q").stdout)
    assert collected.count("::TestMean::") == len(chosen_checks("full")) + 1


def test_a_subclass_may_have_a_higher_level_again(pytest_on):
    tests = of_class("combination = Mean") + "class TestMore(TestRule):\n    level = 'full'"
    result = pytest_on(tests, "--collect-only", "-q", "-k", "TestMore")
    assert str(result.stdout).count("::TestMore::") == len(chosen_checks("full")) + 1


def test_a_failure_shows_the_report_and_no_traceback(pytest_on):
    result = pytest_on(of_class("combination = Wrong"))
    assert counted(result)["failed"] == 1
    result.stdout.fnmatch_lines(
        [
            "Wrong, Wrong()",
            "fail * C1 *pose weights are the derivative of the value",
            "*your backward *",
            "*finite difference * ± *",
            "*likely cause: *",
            "*again: mtenn check rules.py:Wrong --only C1 --seed 0",
            "*- conformance -*",
            "passed: A2, *",
            "again: pytest 'test_rules.py::TestRule::test_c1_*[[]Wrong[]]'",
            "conformance: 1 combination, *1 failed*",
            "FAILED test_rules.py::TestRule::test_c1*",
        ]
    )
    for word in ("Traceback", "All traceback", "def test", "_pytest.py"):
        result.stdout.no_fnmatch_line(f"*{word}*")
    assert str(result.stdout).count("again: pytest") == 1


def test_the_summary_says_the_cause_in_one_line(pytest_on):
    result = pytest_on(of_class("combination = Wrong"), "-vv")
    (line,) = [line for line in result.outlines if line.startswith("FAILED")]
    assert " - C1 fail: " in line
    assert "1.001" in line


@pytest.mark.parametrize("name", ["Mean()", "staticmethod(cube)", "staticmethod(lambda: Mean())"])
def test_a_combination_may_be_an_instance_or_a_function(pytest_on, name):
    assert "failed" not in counted(pytest_on(of_class(f"combination = {name}")))


def test_random_parameters_are_the_same_in_every_test(pytest_on):
    tests = """
import torch
drawn = []

def make():
    drawn.append(torch.rand(()).item())
    return Mean()

@pytest.fixture(autouse=True, scope="module")
def random_state():
    before = torch.get_rng_state()
    yield
    assert len(drawn) > 1
    assert len(set(drawn)) == 1
    assert torch.equal(torch.get_rng_state(), before)
"""
    outcomes = counted(pytest_on(tests + of_class("combination = make")))
    assert not set(outcomes) & {"failed", "errors"}


def test_every_example_of_a_class_is_tested(pytest_on):
    result = pytest_on(of_class("combination = PowerMean"), "-v", "-k", "c1")
    assert counted(result) == {"passed": 2, "deselected": 2 * len(GATE) - 1}
    result.stdout.fnmatch_lines(["*[[]PowerMean(power=2.0)[]] PASSED*"])
    result.stdout.fnmatch_lines(["*[[]PowerMean(power=3.0)[]] PASSED*"])
    result.stdout.fnmatch_lines([f"conformance: 2 combinations, 2 of {2 * len(GATE)} checks: 2 *"])


def test_a_constructor_that_needs_arguments_says_where_to_declare_them(pytest_on):
    result = pytest_on(of_class("combination = NeedsArguments"), "-k", "c1")
    assert counted(result)["failed"] == 1
    result.stdout.fnmatch_lines(
        ["*'power'. Declare the arguments * in the class: examples = ({'name': value},)"]
    )


def test_an_error_names_an_invalid_fact(pytest_on):
    tests = "Mean.min_poses = 0\n" + of_class("combination = Mean")
    result = pytest_on(tests, "-k", "c1")
    result.stdout.fnmatch_lines(["Mean cannot be checked: *Mean.min_poses must be * found 0"])


@pytest.mark.parametrize("examples", ["{'power': 2.0}", "()"])
def test_malformed_examples_are_named(pytest_on, examples):
    tests = f"PowerMean.examples = {examples}\n" + of_class("combination = PowerMean")
    result = pytest_on(tests)
    assert counted(result) == {"errors": 1}
    message = f"*PowerMean.examples must be a tuple of at least one dict*found {examples}. Write*"
    result.stdout.fnmatch_lines([message])


def test_a_skipped_check_says_why(pytest_on):
    result = pytest_on(of_class("combination = Mean"), "-rs", "-k", "a1_ or c3_")
    assert n_skipped(result) == 2
    result.stdout.fnmatch_lines(["SKIPPED*it has no forward of its own"])


def test_an_expected_failure_is_an_xfail_with_its_reason(pytest_on):
    body = "combination = Wrong\n    expected_failures = {'C1': 'a known mistake'}"
    result = pytest_on(of_class(body), "-rx")
    assert counted(result) == {"passed": len(GATE) - n_skipped(result), "xfailed": 1}
    result.stdout.fnmatch_lines(
        ["conformance: *1 failed as expected*", "XFAIL*expected: a known mistake", "*finite *"]
    )


def test_an_unexpected_pass_fails_and_says_what_to_remove(pytest_on):
    body = "combination = Mean\n    expected_failures = {'C1': 'a known mistake'}"
    result = pytest_on(of_class(body))
    assert counted(result)["failed"] == 1
    result.stdout.fnmatch_lines(
        [
            "*the check passes; remove 'C1' from expected_failures",
            "conformance: *1 passed unexpectedly*",
        ]
    )


C1 = "test_c1_pose_weights_are_the_derivative_of_the_value"
TAKEN_OUT = {
    "set to None": f"class TestRule(CombinationConformance):\n    {C1} = None",
    "replaced": f"class TestRule(CombinationConformance):\n    def {C1}(self): pass",
    "skipped": (
        "class TestRule(CombinationConformance):\n"
        f"    @pytest.mark.skip\n    def {C1}(self, case): pass"
    ),
    "hidden by a mixin": (
        f"class Mixin:\n    {C1} = None\nclass TestRule(Mixin, CombinationConformance):"
    ),
    "inherited": (
        f"class Base(CombinationConformance):\n    {C1} = None\nclass TestRule(Base):\n    seed = 1"
    ),
    "set to None later": (
        f"class Base(CombinationConformance): pass\nBase.{C1} = None\nclass TestRule(Base):"
    ),
}


@pytest.mark.parametrize("case", TAKEN_OUT)
def test_a_removed_check_is_a_failure(pytest_on, case):
    result = pytest_on(TAKEN_OUT[case] + "\n    combination = Mean", "-k", "taken_out")
    assert counted(result)["failed"] == 1
    result.stdout.fnmatch_lines([f"TestRule: {C1} must be the test of the suite; found *'C1': *"])


def test_a_check_may_be_removed_with_a_reason(pytest_on):
    body = f"combination = Mean\n    {C1} = None\n    expected_failures = {{'C1': 'too slow'}}"
    result = pytest_on(of_class(body))
    assert counted(result) == {"passed": len(GATE) - n_skipped(result)}
    result.stdout.fnmatch_lines([f"conformance: 1 combination, {len(GATE) - 1} of {len(GATE)} *"])


def test_the_test_for_removed_checks_cannot_be_removed(pytest_on):
    result = pytest_on(of_class("combination = Mean\n    test_no_check_was_taken_out = None"))
    assert counted(result) == {"errors": 1}
    result.stdout.fnmatch_lines(["*TestRule must not replace test_no_check_was_taken_out"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", "combination must be a class, * found None. Write: combination = MyComb*"),
        ("combination = 'mean'", "combination must be a class, * found 'mean'. Write: *"),
        (
            "combination = Mean\n    expected_failures = {'C99': 'why'}",
            "expected_failures: no check has the id 'C99'; known ids: *C1*",
        ),
        (
            "combination = Mean\n    expected_failures = {'C1': ' '}",
            "expected_failures: 'C1' needs a reason in words; found ' '",
        ),
    ],
)
def test_invalid_attributes_of_a_test_class_fail(pytest_on, body, message):
    result = pytest_on(of_class(body), "-k", "taken_out")
    assert counted(result)["failed"] == 1
    result.stdout.fnmatch_lines([f"TestRule: *{message}"])


def test_a_class_without_a_combination_has_one_failure(pytest_on):
    assert pytest_on(of_class("pass")).parseoutcomes() == {"failed": 1}


def test_an_unknown_level_is_named(pytest_on):
    result = pytest_on(of_class("combination = Mean", level="complete"))
    result.stdout.fnmatch_lines(["*level must be one of gate, full, quality; found 'complete'"])


DECORATED = """
@parametrize_with_checks({combinations}, level="gate"{more})
def test_rule(combination, check):
    check(combination)
"""


def decorated(combinations, more=""):
    return DECORATED.format(combinations=combinations, more=more)


def test_the_decorator_makes_a_test_of_each_check_of_each_combination(pytest_on):
    result = pytest_on(decorated("[Mean(), PowerMean, cube]"), "-v")
    assert counted(result) == {"passed": 4 * len(GATE) - n_skipped(result)}
    for who in ("Mean", "PowerMean(power=2.0)", "PowerMean(power=3.0)", "cube"):
        result.stdout.fnmatch_lines([f"test_rules.py::test_rule[[]{who}-C1[]] PASSED*"])
    result.stdout.fnmatch_lines([f"conformance: 4 combinations, {4 * len(GATE)} checks: *"])


def test_combinations_with_equal_labels_have_different_ids(pytest_on):
    result = pytest_on(decorated("[lambda: Mean(), lambda: Wrong()]"))
    result.stdout.fnmatch_lines([f"conformance: 2 combinations, {2 * len(GATE)} checks: *"])
    result.stdout.fnmatch_lines(["FAILED test_rules.py::test_rule[[]<lambda>#2-C1[]] - *"])


def test_two_decorated_tests_of_one_combination_count_twice(pytest_on):
    result = pytest_on(decorated("[Mean()]") + decorated("[Mean()]").replace("_rule", "_again"))
    result.stdout.fnmatch_lines([f"conformance: 2 combinations, {2 * len(GATE)} checks: *"])


def test_a_failure_of_the_decorator_shows_the_same_report(pytest_on):
    result = pytest_on(decorated("[Wrong()]"))
    assert counted(result)["failed"] == 1
    result.stdout.fnmatch_lines(
        [
            "Wrong, Wrong()",
            "*your backward *",
            "*again: mtenn check rules.py:Wrong --only C1 --seed 0",
            "passed: A2, *",
            "again: pytest 'test_rules.py::test_rule[[]Wrong-C1[]]'",
        ]
    )


def test_a_check_that_is_called_raises_an_assertion_error(pytest_on):
    test = DECORATED.replace("    check(combination)", "    with pytest.raises(AssertionError, ")
    test = test.replace("AssertionError, ", "AssertionError, match='your backward'): {body}")
    result = pytest_on(
        test.format(combinations="[Wrong]", more="", body="check(combination)"), "-k", "C1"
    )
    assert counted(result)["passed"] == 1


@pytest.mark.parametrize(
    "expected",
    ["{'C1': 'known'}", "lambda found: {'C1': 'known'} if isinstance(found, Wrong) else {}"],
)
def test_the_decorator_takes_expected_failures(pytest_on, expected):
    result = pytest_on(decorated("[Wrong()]", f", expected_failures={expected}"))
    assert counted(result)["xfailed"] == 1
    assert "failed" not in counted(result)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (", expected_failures={'C99': 'why'}", "no check has the id 'C99'"),
        (", expected_failures={'C1': ''}", "'C1' needs a reason"),
    ],
)
def test_the_decorator_refuses_invalid_expected_failures(pytest_on, more, message):
    result = pytest_on(decorated("[Mean]", more))
    assert counted(result) == {"errors": 1}
    result.stdout.fnmatch_lines([f"*ValueError: expected_failures: *{message}*"])


def test_a_junit_file_has_a_case_for_each_check(pytest_on, pytester):
    tests = of_class("combination = Wrong") + decorated("[Mean]")
    assert pytest_on(tests, "--junitxml", "found.xml").ret == pytest.ExitCode.TESTS_FAILED
    cases = ElementTree.parse(pytester.path / "found.xml").findall(".//testcase")
    ids = [check.id for check in GATE]
    of_decorator = [case.get("name") for case in cases if case.get("classname") == "test_rules"]
    assert of_decorator == [f"test_rule[Mean-{id}]" for id in ids]
    of_class_ = [case for case in cases if case.get("classname") == "test_rules.TestRule"]
    found = [case.get("name").split("_")[1].upper() for case in of_class_]
    assert [id for id in found if id != "NO"] == ids
    (failure,) = [failure for case in cases for failure in case.findall("failure")]
    assert failure.get("message").startswith("C1 fail: ")
    assert "finite difference" in failure.text


def test_the_summary_says_how_many_checks_ran(pytest_on):
    result = pytest_on(of_class("combination = Mean"), "-k", "c1")
    result.stdout.fnmatch_lines([f"conformance: 1 combination, 1 of {len(GATE)} checks: 1 passed"])


def test_reports_of_workers_come_together_in_the_controller(pytest_on, pytester):
    """What pytest-xdist does: reports go as plain data from workers, which write nothing."""
    pytester.makeconftest(
        """
        import json
        import pytest
        from pathlib import Path

        @pytest.hookimpl(tryfirst=True)
        def pytest_configure(config):
            config.workerinput = {}

        def pytest_runtest_logreport(report):
            with Path("sent").open("a") as sent:
                print(json.dumps(report._to_json()), file=sent)
        """
    )
    result = pytest_on(of_class("combination = Wrong"))
    result.stdout.no_fnmatch_line("conformance: *")

    controller = ConformanceSummary()
    sent = (pytester.path / "sent").read_text().splitlines()
    reports = [pytest.TestReport._from_json(json.loads(line)) for line in reversed(sent)]
    for report in reports:
        controller.pytest_runtest_logreport(report)
    controller.pytest_sessionfinish()
    (context,) = [content for report in reports for title, content in report.sections]
    n_passed = context.partition("\n")[0].count(",") + 1
    n_skipped = len(GATE) - n_passed - 1
    assert controller._summary() == (
        f"conformance: 1 combination, {len(GATE)} checks: {n_passed} passed, 1 failed,"
        f" {n_skipped} skipped"
    )


HAZARD = "A10: a loss that contains gradients, such as a gradient penalty, trains with wrong*"
TO_DO = "    to do: decorate backward with torch.autograd.function.once_differentiable"


def test_advice_is_a_passed_test_and_a_line_of_the_summary(pytest_on):
    result = pytest_on(of_class("combination = Advised", "full"), "-k", "a10_ or a8_")
    assert counted(result) == {"passed": 2, "deselected": len(FULL) - 1}
    result.stdout.fnmatch_lines(
        [
            f"conformance: 1 combination, 2 of {len(FULL)} checks: 1 passed, 1 with advice",
            f"advice: test_rules.py::TestRule Advised, {HAZARD}",
            TO_DO,
        ]
    )


def test_advice_is_a_failed_test_at_the_level_quality(pytest_on):
    tests = of_class("combination = Advised", "quality")
    result = pytest_on(tests, "-k", "a10_", "-vv")
    assert counted(result)["failed"] == 1
    result.stdout.fnmatch_lines([TO_DO, "*again: mtenn check rules.py:Advised * --level quality"])
    (line,) = [line for line in result.outlines if line.startswith("FAILED")]
    assert " - A10 fail: a loss that contains" in line
    result.stdout.no_fnmatch_line("advice: *")


@pytest.mark.slow("workers of pytest-xdist, which import torch")
def test_advice_of_workers_is_in_the_summary(pytest_on, pytester):
    pytest_on(of_class("combination = Advised", "full"), "--collect-only")
    result = pytester.runpytest_subprocess(
        "-pxdist", "-pmtenn_core._pytest_plugin", "-n2", "-k", "a10_ or a11_"
    )
    result.stdout.fnmatch_lines(
        [
            f"conformance: 1 combination, 2 of {len(FULL)} checks: * with advice",
            f"advice: test_rules.py::TestRule Advised, {HAZARD}",
            TO_DO,
        ]
    )


HEAVY = ("torch", "importlib_metadata", "mtenn_core.testing", "mtenn_core._registry")


def test_a_run_without_conformance_tests_loads_nothing_heavy(pytester):
    """As in every project of the environment that mtenn-core is installed in."""
    pytester.makepyfile(
        f"""
        import sys

        def test_light(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("mtenn-conformance-summary")
            assert not set({HEAVY}) & set(sys.modules)
        """
    )
    result = pytester.runpytest_subprocess("-W", "error")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("conformance: *")


def loaded_by(code):
    code = f"import sys; {code}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_plugin_is_light_and_the_suite_needs_no_pytest():
    assert not set(HEAVY) & set(loaded_by("import mtenn_core._pytest_plugin"))
    assert "pytest" not in loaded_by("import mtenn_core.testing")
