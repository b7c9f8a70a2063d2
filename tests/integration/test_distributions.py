"""What a release uploads: source distributions and wheels, which are built, unpacked and installed.

An environment here sees only what the distributions require, and pip asks no index.
``tox run -e dist,wheels`` does the same in an environment that pip fills, and runs all checks.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow("only a release needs build, twine and rattler-build")

ROOT = Path(__file__).parents[2]
FOLDERS = {"mtenn-core": ROOT, **{path.name: path for path in ROOT.glob("plugins/mtenn-*")}}
PLUGINS = sorted(FOLDERS.keys() - {"mtenn-core"})
TABLE = "compound,score\na,-7.0\na,-5.0\nb,-6.0\n"


def run(*command: object, cwd: Path | None = None, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, encoding="utf-8", **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the source distribution of each folder, and the wheel made from it."""
    built = tmp_path_factory.mktemp("dist")
    for folder in FOLDERS.values():
        # It builds the wheel from the source distribution.
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, folder)
    return built


@pytest.fixture(params=FOLDERS)
def distribution(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def wheel(dist: Path, distribution: str) -> Path:
    (path,) = dist.glob(f"{distribution.replace('-', '_')}-*.whl")
    return path


@pytest.fixture
def sdist(dist: Path, distribution: str) -> Path:
    (path,) = dist.glob(f"{distribution.replace('-', '_')}-*.tar.gz")
    return path


def content(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_twine_accepts_it(sdist, wheel):
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)


def test_a_wheel_has_its_package_and_licence_and_nothing_else(wheel, distribution):
    files = content(wheel)
    package = distribution.replace("-", "_")
    info = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert f"{package}/py.typed" in files
    entry_points = b"[console_scripts]" if package == "mtenn_core" else b"[mtenn.combinations]"
    assert entry_points in files[f"{info}/entry_points.txt"]
    sources = {
        path.relative_to(FOLDERS[distribution]).as_posix()
        for path in (FOLDERS[distribution] / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in files if not name.startswith(info)} == sources


def test_a_source_distribution_has_its_licence_and_tests(sdist):
    with tarfile.open(sdist) as opened:
        files = {name.partition("/")[2] for name in opened.getnames()}
    assert {"LICENSE", "pyproject.toml", "PKG-INFO"} <= files
    assert any(name.startswith("tests/test_") for name in files)
    needs_the_repository = {"tests/test_packaging.py", "tests/test_public_interface.py"}
    assert not needs_the_repository & files
    assert not any(name.startswith(("plugins/", "tests/integration")) for name in files)
    assert not any("__pycache__" in name for name in files)


def test_the_source_distribution_of_the_core_has_what_its_readme_links_to(dist):
    (sdist,) = dist.glob("mtenn_core-*.tar.gz")
    with tarfile.open(sdist) as opened:
        files = {name.partition("/")[2] for name in opened.getnames()}
    linked = re.findall(r"\]\(([^:)#]+)[^:)]*\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert "SECURITY.md" in linked
    assert set(linked) <= files


def test_a_source_distribution_builds_the_wheel_of_the_repository(wheel, distribution, tmp_path):
    folder = FOLDERS[distribution]
    command = ("-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, folder)
    run(sys.executable, *command)
    assert content(tmp_path / wheel.name) == content(wheel)


def required(distribution: str, extras: tuple[str, ...] = ("",)) -> set[str]:
    """Return what a distribution needs, directly or not, except for those of this repository."""
    found: set[str] = set()
    for line in metadata.requires(distribution) or ():
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
        if wanted and name not in FOLDERS and name not in found:
            found |= {name} | required(name, ("", *requirement.extras))
    return found


def link(distribution: str, site: Path) -> None:
    """Let ``site`` see an installed distribution, without copying it."""
    installed = metadata.distribution(distribution)
    parts = {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}
    for part in parts:
        if not (site / part).exists():
            (site / part).symlink_to(installed.locate_file(part).resolve())


@pytest.fixture
def new_environment(tmp_path: Path, dist: Path) -> Callable[..., Path]:
    """Install wheels into an environment that has only what they require, and return its python."""

    def new_environment(requirement: str, needs: set[str]) -> Path:
        folder = tmp_path / "environment"
        venv.create(folder, symlinks=sys.platform != "win32")
        paths = {"base": str(folder), "platbase": str(folder)}
        for name in needs:
            link(name, Path(sysconfig.get_path("purelib", "venv", paths)))
        scripts = Path(sysconfig.get_path("scripts", "venv", paths))
        python = scripts / Path(sys.executable).name
        pip = (sys.executable, "-m", "pip", "--python", python)
        run(*pip, "install", "-q", "--no-index", "--find-links", dist, requirement)
        assert "No broken requirements found" in run(*pip, "check")
        return python

    return new_environment


def combinations(distributions: list[str]) -> list[str]:
    """Return the names of the combinations that the distributions declare."""
    points = [metadata.distribution(name).entry_points for name in distributions]
    return sorted(name for each in points for name in each.select(group="mtenn.combinations").names)


def listed(python: Path, cwd: Path) -> list[str]:
    records = json.loads(run(python, "-m", "mtenn_core", "list", "--json", cwd=cwd))
    return sorted(record["name"] for record in records)


def test_the_core_alone_installs_and_lists_nothing(new_environment, tmp_path):
    assert listed(new_environment("mtenn-core", required("mtenn-core")), tmp_path) == []


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_brings_the_core_and_passes_the_gate(plugin, new_environment, tmp_path):
    python = new_environment(plugin, required("mtenn-core") | required(plugin))
    assert listed(python, tmp_path) == combinations([plugin])
    run(python, "-m", "mtenn_core", "check", "--all", "--level", "gate", cwd=tmp_path)


def test_the_extras_bring_all_plugins_and_tables(new_environment, tmp_path):
    python = new_environment(
        "mtenn-core[plugins,tables]", required("mtenn-core", ("", "plugins", "tables"))
    )
    assert listed(python, tmp_path) == combinations(PLUGINS)
    (tmp_path / "poses.csv").write_text(TABLE)
    columns = ("--by", "compound", "--column", "score")
    command = (python.parent / "mtenn", "combine", "poses.csv", "mean", *columns)
    assert run(*command, cwd=tmp_path).splitlines()[1:] == ["a,-6.0,2.0,2", "b,-6.0,1.0,1"]


def test_rattler_build_reads_the_conda_recipe(distribution):
    import rattler_build  # the environment of the fast tests does not have it

    path = ROOT / "packaging/conda" / distribution / "recipe.yaml"
    recipe = rattler_build.Stage0Recipe.from_file(str(path))
    (variant,) = recipe.render(rattler_build.VariantConfig(), rattler_build.RenderConfig())
    assert variant.recipe.package.name == distribution
    assert str(variant.recipe.package.version) == metadata.version(distribution)
