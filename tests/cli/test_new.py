import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from tiers import slow

import mtenn_core
from mtenn_core import registry
from mtenn_core._cli import main
from mtenn_core._cli import new as command

CORE = Path(__file__).parents[2] / "pyproject.toml"
TOO_LONG = "n" * (command.MAX_LENGTH + 1)
FILES = [
    ".gitignore",
    "README.md",
    "mtenn_my_rule/__init__.py",
    "mtenn_my_rule/py.typed",
    "pyproject.toml",
    "tests/test_my_rule.py",
    "tox.ini",
]


@pytest.fixture
def new(tmp_path, monkeypatch):
    """Run ``mtenn new`` in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    registry.refresh()
    yield lambda *args: CliRunner().invoke(main, ["new", *args])
    registry.refresh()


def read_pyproject(path):
    return tomllib.loads(Path(path).read_text(encoding="utf-8"))


def files_in(folder):
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def run_its_tests(folder):
    """Run the package's own pytest, with metadata as pip would install it."""
    project = read_pyproject(folder / "pyproject.toml")["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        + "".join(f"Requires-Dist: {requirement}\n" for requirement in project["dependencies"])
    )
    ((name, target),) = project["entry-points"]["mtenn.combinations"].items()
    (info / "entry_points.txt").write_text(f"[mtenn.combinations]\n{name} = {target}\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_it_writes_a_package_and_says_what_to_do_next(new):
    result = new("my-rule")
    assert result.exit_code == 0, result.output
    assert files_in("mtenn-my-rule") == FILES
    wrote = re.findall(r"^wrote (.+)$", result.stdout, re.MULTILINE)
    assert sorted(Path(path).relative_to("mtenn-my-rule").as_posix() for path in wrote) == FILES
    assert f"Change {Path('mtenn-my-rule/mtenn_my_rule/__init__.py')} at the " in result.stdout
    commands = re.findall(r"^  (.+)$", result.stdout, re.MULTILINE)
    assert commands == ["cd mtenn-my-rule", "pip install -e .", "mtenn check my-rule", "tox"]
    readme = Path("mtenn-my-rule/README.md").read_text(encoding="utf-8")
    assert "If no package index has it, see README.md, Install" in result.stdout
    install = readme.partition("## Install")[2].partition("## Use")[0]
    assert "export PIP_FIND_LINKS=" in install
    assert "pip still looks on the index" in install


def test_its_combination_passes_every_level_without_advice(new, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert new("my-rule").exit_code == 0
    target = "mtenn-my-rule/mtenn_my_rule/__init__.py:MyRuleCombination"
    result = CliRunner().invoke(main, ["check", target, "--level", "quality"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, ["check", target, "--only", "A10", "--only", "D4"])
    assert "advice" not in result.output


def test_json_has_the_files(new, tmp_path):
    result = new("my-rule", "--json", "--output", str(tmp_path / "a folder"))
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert written["name"] == "my-rule"
    assert written["folder"] == str(tmp_path / "a folder")
    assert sorted(written["files"]) == [str(tmp_path / "a folder" / path) for path in FILES]


@pytest.mark.parametrize(
    ("given", "name", "snake", "camel"),
    [
        ("x", "x", "x", "X"),
        ("my-rule", "my-rule", "my_rule", "MyRule"),
        ("My_Rule", "my-rule", "my_rule", "MyRule"),
        ("top..3-kT", "top-3-kt", "top_3_kt", "Top3Kt"),
        ("mtenn-my-rule", "my-rule", "my_rule", "MyRule"),
        ("MTENN_lse", "lse", "lse", "Lse"),
        (
            "n" * command.MAX_LENGTH,
            "n" * command.MAX_LENGTH,
            "n" * command.MAX_LENGTH,
            "N" + "n" * 34,
        ),
    ],
    ids=lambda value: value[:20],
)
def test_all_names_derive_from_one_name(new, given, name, snake, camel):
    result = new(given)
    assert result.exit_code == 0, result.output
    folder = Path(f"mtenn-{name}")
    project = read_pyproject(folder / "pyproject.toml")["project"]
    assert project["name"] == f"mtenn-{name}"
    assert project["entry-points"]["mtenn.combinations"] == {
        name: f"mtenn_{snake}:{camel}Combination"
    }
    source = (folder / f"mtenn_{snake}" / "__init__.py").read_text(encoding="utf-8")
    assert f"\nclass {camel}Combination(Combination):\n" in source
    tests = (folder / "tests" / f"test_{snake}.py").read_text(encoding="utf-8")
    assert f"import mtenn_{snake} as plugin\n" in tests
    assert f"combination = plugin.{camel}Combination\n" in tests
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        compile(text, path, "exec")
        assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    "name",
    ["", "3d", "mtenn-3d", "mtenn-", "-", "_x", "x-", "a b", "../a", "a:b", "µ", "a\n", TOO_LONG],
    ids=repr,
)
def test_an_invalid_name_is_wrong_usage(new, name):
    result = new("--", name)
    assert result.exit_code == 2
    assert "'NAME': a name must start with a letter" in " ".join(result.stderr.split())
    assert files_in(".") == []


def test_a_name_that_is_taken_is_refused_with_its_owner(new, install_plugin):
    install_plugin("demo-rules", {"My.Rule": "demo_rules:Rule"}, "raise SystemExit('imported')")
    registry.refresh()
    result = new("my-rule")
    assert result.exit_code == 1
    assert "error: the name 'my-rule' belongs to plugin 'My.Rule' (demo-rules 1.0)" in result.stderr
    result = new("my-rule", "--json")
    assert json.loads(result.stdout)["error"]["type"] == "CombinationConflictError"
    assert files_in(".") == []


def test_a_distribution_of_the_same_name_is_not_replaced(new, install_plugin):
    install_plugin("mtenn-my-rule", {"another-name": "mtenn_my_rule:Rule"})
    result = new("my-rule")
    assert result.exit_code == 1
    assert "but mtenn-my-rule 1.0 is installed. Choose another name" in result.stderr
    result = new("core")
    assert result.exit_code == 1
    assert f"but mtenn-core {mtenn_core.__version__} is installed" in result.stderr
    assert files_in(".") == []


def test_nothing_in_a_folder_is_overwritten(new):
    Path("mtenn-my-rule").mkdir()
    Path("mtenn-my-rule/README.md").write_text("mine")
    result = new("my-rule")
    assert result.exit_code == 1
    assert "error: mtenn-my-rule must be empty; found files. Nothing was written" in result.stderr
    assert files_in(".") == ["mtenn-my-rule/README.md"]
    assert Path("mtenn-my-rule/README.md").read_text() == "mine"


def test_an_empty_folder_is_taken_and_a_deep_one_is_made(new):
    Path("empty").mkdir()
    assert new("my-rule", "--output", "empty").exit_code == 0
    assert new("my-rule", "--output", "one/two").exit_code == 0
    assert files_in("empty") == files_in("one/two") == FILES


def test_a_file_is_no_folder(new):
    Path("file").touch()
    result = new("my-rule", "--output", "file")
    assert result.exit_code == 2
    assert "is a file" in result.stderr
    result = new("my-rule", "--output", "file/folder")
    assert result.exit_code == 1
    assert "error: the package in file/folder is incomplete: " in result.stderr


def test_a_full_disk_is_an_error_that_says_where(new, monkeypatch):
    def open_full(path, *args, **kwargs):
        if path.suffix == ".toml":
            raise OSError(28, "No space left on device", str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    result = new("my-rule")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the package in mtenn-my-rule is incomplete: ")
    assert "No space left on device" in result.stderr
    assert "pyproject.toml" in result.stderr


def test_it_needs_no_torch_and_imports_no_plugin(tmp_path):
    code = """
import sys
from mtenn_core._cli import main
main(["new", "my-rule"], standalone_mode=False)
assert "torch" not in sys.modules
assert not [name for name in sys.modules if name.startswith("mtenn_") and name[:10] != "mtenn_core"]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "mtenn-my-rule") == FILES


@pytest.mark.parametrize(
    "name", slow("my-rule", "test-rule", reason="tests/integration checks the package, too")
)  # pytest collects Test…
def test_its_own_tests_pass(new, name):
    assert new(name).exit_code == 0
    done = run_its_tests(Path(f"mtenn-{name}").resolve())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conformance: 1 combination, " in done.stdout
    assert re.search(r"README\.md +\.", done.stdout)


def test_its_own_tests_fail_where_the_derivative_is_made_wrong(new):
    assert new("my-rule").exit_code == 0
    module = Path("mtenn-my-rule/mtenn_my_rule/__init__.py")
    source = module.read_text(encoding="utf-8")
    right, wrong = "1 / len(predictions))", "1.001 / len(predictions))"
    assert source.count(right) == 1
    module.write_text(source.replace(right, wrong), encoding="utf-8")
    done = run_its_tests(Path("mtenn-my-rule").resolve())
    assert done.returncode == 1, done.stdout + done.stderr
    assert "every weight is 1.001 times the correct one" in done.stdout


@pytest.mark.parametrize(
    ("version", "versions"),
    [
        ("0.1.0", ">=0.1,<0.2"),
        ("0.1.7", ">=0.1,<0.2"),
        ("0.2.0.dev3", ">=0.2.0.dev3,<0.3"),
        ("1.4.2+local", ">=1.4,<2"),
        ("2.0.0rc1", ">=2.0.0rc1,<3"),
    ],
)
def test_it_requires_compatible_versions_of_the_core(version, versions):
    found = command._versions_of_core(version)
    assert found == versions
    assert Requirement(f"mtenn-core{found}").specifier.contains(version, prereleases=True)


def test_it_has_the_build_system_and_python_of_the_core(new):
    assert new("my-rule").exit_code == 0
    core, package = read_pyproject(CORE), read_pyproject("mtenn-my-rule/pyproject.toml")
    assert package["build-system"] == core["build-system"]
    assert package["project"]["requires-python"] == core["project"]["requires-python"]
    assert package["project"]["dependencies"] == [
        f"mtenn-core{command._versions_of_core(mtenn_core.__version__)}",
        *(each for each in core["project"]["dependencies"] if each.startswith("torch")),
    ]


def test_every_template_is_used():
    templates = {path.name for path in command.TEMPLATES.iterdir()}
    assert templates == set(command.TEMPLATE_OF.values())
