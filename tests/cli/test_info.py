"""What ``mtenn info`` says of a combination and of a checkpoint."""

import json
import re
from decimal import Decimal

import pytest
import torch
from click.testing import CliRunner
from installed import write_distribution

from mtenn_core import MultiPoseModel, registry
from mtenn_core._cli import main
from mtenn_core._cli.docstrings import docstring_of

PLUGIN = '''
    import torch
    from mtenn_core import Combination

    print("imported")

    class Base(Combination):
        """A base.

        Parameters
        ----------
        scale : the sharpness t, in one over the
            unit of ``predictions``
        """

        def __init__(self, scale=2.0, kind="mean", *rest, needed, **more):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.tensor([0.5]))

        def combine(self, predictions, strain):
            return predictions.mean()

    class Described(Base):
        """The scaled mean of the poses,
        Σ_i y_i / M.

        It is like :class:`~mtenn.Base` with ``strain``.

        Parameters
        ----------
        scale, kind : see :class:`Base`
        *rest
            further numbers
        needed : float, optional
            Thermal energy.

        Raises
        ------
        ValueError : never
        """

        smooth = False
        min_poses = 2
        domain = (0.0, float("inf"))
        pose_inputs = {"strain": "real"}
        properties = frozenset({"bounded", "monotone"})
        examples = ({"needed": 1}, {"needed": 2, "scale": 3.0})

    class Plain(Combination):
        def combine(self, predictions):
            return predictions.mean()

    class Varying(Combination):
        examples = ({"columns": 2}, {"columns": 3})
        pose_columns = "any"

        def __init__(self, columns):
            super().__init__()
            self.pose_columns = columns

        @property
        def min_poses(self):
            return self.pose_columns + 1

        def combine(self, predictions):
            return predictions.mean()

    class Malformed(Combination):
        examples = 3

        def combine(self, predictions):
            return predictions.mean()
'''


@pytest.fixture
def info(places):
    names = {
        name.lower(): f"demo_described:{name}"
        for name in ("Described", "Plain", "Varying", "Malformed")
    }
    names |= {"broken": "demo_broken:Absent", "ends": "demo_ends:X"}
    write_distribution(places.site, "demo-described", names, PLUGIN)
    (places.site / "demo_broken.py").write_text("raise OSError('a disk is full')")
    (places.site / "demo_ends.py").write_text("raise SystemExit(3)")
    registry.refresh()

    def run(*arguments, code=0):
        result = CliRunner().invoke(main, ["info", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    yield run
    registry.refresh()


def saved(combination, folder, name="model.pt", tasks=None):
    model = MultiPoseModel(torch.nn.Linear(2, 2), combination, tasks=tasks)
    torch.save(model.state_dict(), folder / name)
    return folder / name


def test_info_says_what_a_combination_does(info):
    result = info("described")
    for line in (
        "distribution  demo-described",
        "The scaled mean of the poses, Σ_i y_i / M.",
        "It is like mtenn.Base with strain.",
        "  scale = 2.0\n      the sharpness t, in one over the unit of predictions",
        "  kind = 'mean'",
        "  *rest\n      further numbers",
        "  needed (required)\n      Thermal energy.",
        "  **more",
        "pose inputs   strain (real)",
        "min poses     2",
        "domain        (0.0, inf)",
        "smooth        no: its value has kinks",
        "derivative    by autograd",
        "properties    bounded, monotone",
        "example       needed=2, scale=3.0",
    ):
        assert line in result.stdout
    assert "imported" not in result.stdout  # what a plugin prints goes to standard error


def test_info_of_a_class_without_a_docstring_does_not_show_that_of_its_base(info):
    found = json.loads(info("plain", "--json").stdout)["combination"]
    assert (found["summary"], found["text"], found["arguments"]) == ("", "", [])
    assert found["domain"] == [None, None]
    assert "A rule h that makes one prediction" not in info("plain").stdout


def test_info_shows_a_fact_that_depends_on_the_arguments(info):
    result = info("varying")
    assert "pose columns  any\n" in result.stdout
    assert "min poses     3\n" in result.stdout
    assert "note          min_poses: as in the first example\n" in result.stdout


def test_info_imports_nothing_if_asked(info, monkeypatch):
    monkeypatch.setattr("mtenn_core.Registry.get", None)
    for arguments in (["described"], ["described", "--json"]):
        result = info(*arguments, "--no-import")
        assert "demo_described:Described" in result.stdout
        assert "Σ" not in result.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "OSError: a disk is full"),
        ("ends", "SystemExit: 3"),
        ("malformed", "Malformed.examples must be a tuple"),
    ],
)
def test_info_shows_the_facts_and_the_error_of_a_broken_plugin(info, name, message):
    result = info(name)
    assert "distribution  demo-described" in result.stdout
    assert message in result.stdout
    found = json.loads(info(name, "--json").stdout)
    assert found["combination"] is None
    assert message in found["not_imported"]


def test_info_imports_torch_in_spite_of_a_distribution_that_stops_it(info, places):
    write_distribution(places.site, "demo-bad", "[console_scripts]\nno equals sign\n", None)
    registry.refresh()
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in info("plain").stderr
    assert info("plain", "--no-import").stderr == ""


def test_a_parameter_of_numpydoc_and_one_of_this_project_are_read():
    class Documented:
        """Summary.

        Parameters
        ----------
        kT : float, optional
            Thermal energy.
        scale : {"a", "b"}
            One of two.
        shift : added to the mean;
            in kcal/mol
        a, b : two numbers
        bare
        """

    assert docstring_of(Documented).parameters == {
        "kT": "Thermal energy.",
        "scale": "One of two.",
        "shift": "added to the mean; in kcal/mol",
        "a": "two numbers",
        "b": "two numbers",
    }


def test_a_docstring_may_have_no_section():
    class OneLine:
        """One line."""

    assert docstring_of(OneLine) == ("One line.", "", {})


def test_info_shows_what_is_in_a_checkpoint(info, tmp_path):
    combination = registry.create("described", needed=(1, 2), validate=False)
    with torch.no_grad():
        combination.log_scale.fill_(-0.25)
    path = saved(combination, tmp_path)
    result = info(path)
    for line in (
        f"file          {path} (torch)",
        "combination   described (demo-described 1.0, demo_described:Described)",
        "argument      needed = (1, 2)",
        "tensor        log_scale = -0.25",
        "now           Described(scale=2.0, kind='mean', needed=(1, 2))",
        "pose model    6 numbers in parameters and buffers",
        "installed     yes, and it passes the gate",
    ):
        assert line in result.stdout
    assert "imported" not in result.stdout


def test_info_of_a_checkpoint_imports_nothing_if_asked(info, tmp_path, monkeypatch):
    path = saved(registry.create("plain"), tmp_path)
    monkeypatch.setattr("mtenn_core.Registry.from_checkpoint", None)
    found = json.loads(info(path, "--no-import", "--json").stdout)
    assert found["models"][0]["status"] == "not imported"
    assert "combination   plain" in info(path, "--no-import").stdout


def test_info_of_a_checkpoint_says_which_plugin_is_missing(info, tmp_path, places):
    path = saved(registry.create("plain"), tmp_path)
    (places.site / "demo_described-1.0.dist-info" / "entry_points.txt").write_text("")
    registry.refresh()
    result = info(path)
    assert "combination   plain (demo-described 1.0" in result.stdout
    assert re.search(r"problem .*pip install demo-described==1.0", result.stdout)


def test_info_shows_the_names_of_tasks(info, tmp_path):
    result = info(saved(registry.create("plain"), tmp_path, tasks=("affinity", "toxicity")))
    assert "tasks         affinity, toxicity\n" in result.stdout


def test_info_shows_every_model_and_task_of_a_checkpoint(info, tmp_path):
    plain = registry.create("plain")
    state = torch.load(saved([plain, plain], tmp_path, tasks=2), weights_only=True)
    lightning = {f"model.{key}": value for key, value in state.items()}
    torch.save({"state_dict": lightning, "ema": state}, tmp_path / "model.ckpt")
    result = info(tmp_path / "model.ckpt")
    assert "model         state_dict.model\n" in result.stdout
    assert "model         ema\n" in result.stdout
    assert result.stdout.count("tasks         2 without names") == 2
    assert result.stdout.count("combination   plain") == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: .*No such file"),
        (b"hello", "is no checkpoint"),
        ({"weight": torch.zeros(2)}, "no key that ends in '_extra_state'"),
        ({"a": Decimal("0.1")}, "contains decimal.Decimal"),
    ],
    ids=["missing", "text", "no combination", "pickle"],
)
def test_info_of_a_file_that_is_no_checkpoint_is_an_error(info, tmp_path, content, message):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert re.search(message, info(path, code=1).stderr)
    error = json.loads(info(path, "--json", code=1).stdout)["error"]
    assert error["type"] == "CheckpointError"


def test_a_file_does_not_hide_the_combination_with_its_name(info, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(registry.create("plain"), tmp_path, name="plain")
    saved(registry.create("plain"), tmp_path, name="best")
    assert "target        demo_described:Plain" in info("plain").stdout
    assert "file          best (torch)" in info("best").stdout
    assert "file          ./plain (torch)" in info("./plain").stdout


def test_nothing_in_a_checkpoint_controls_the_terminal(info, tmp_path):
    combination = registry.create("described", needed="\x1b[2J\u202e", validate=False)
    result = info(saved(combination, tmp_path))
    assert "\x1b" not in result.output
    assert "\\x1b[2J" in result.stdout
