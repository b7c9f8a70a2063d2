"""The docking example: its statistics, its combinations, and a short run from end to end."""

import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from rdkit import Chem

from mtenn_core import Combination, registry

FOLDER = Path(__file__).parents[3] / "examples" / "docking"
MODULES = ("systems", "dock", "combine", "agreement", "figures", "demo")
KT = 0.593
SMALL = ["--ligands", "2", "--exhaustiveness", "1", "--poses", "3"]


@pytest.fixture(scope="module")
def example():
    """The example's modules, which import each other by their bare names as scripts do."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


# In a process of its own: meeko sends RDKit's messages elsewhere and warns.
def run(folder, *arguments):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "demo.py"), "--output", str(folder), *arguments],
        cwd=folder.parent,
        env=os.environ | {"COLUMNS": "100"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    return SimpleNamespace(code=done.returncode, printed=done.stdout, errors=done.stderr)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docking") / "new"
    done = run(folder, *SMALL, "--json", "figures.json")
    assert done.code == 0, done.printed + done.errors
    figures = json.loads((folder.parent / "figures.json").read_text())
    return SimpleNamespace(folder=folder, figures=figures, printed=done.printed, errors=done.errors)


@pytest.fixture
def random():
    return np.random.default_rng(1)


def docked(example, *energies):
    """Ligands with these pose energies and nothing else."""
    return [example.dock.Docked(None, (), of_one, ()) for of_one in energies]


def test_poses_are_sorted_and_lie_in_the_files(ran):
    assert len(ran.figures["ligands"]) == 2
    for ligand in ran.figures["ligands"]:
        poses = list(
            Chem.SDMolSupplier(str(ran.folder / "tyk2" / "poses" / f"{ligand['name']}.sdf"))
        )
        assert 1 <= len(poses) <= 3
        assert ligand["energies"] == sorted(ligand["energies"])
        assert ligand["energies"][0] < -5  # kcal/mol: it is in the pocket
        assert [float(pose.GetProp("vina_energy (kcal/mol)")) for pose in poses] == ligand[
            "energies"
        ]
        assert len(ligand["rmsds"]) == len(poses)
        assert {pose.GetNumHeavyAtoms() for pose in poses} == {ligand["heavy_atoms"]}


def test_the_rmsd_is_that_of_the_best_matching_in_place(ran):
    references = Chem.SDMolSupplier(str(ran.folder / "tyk2" / "reference.sdf"))
    for ligand, reference in zip(ran.figures["ligands"], references, strict=True):
        path = ran.folder / "tyk2" / "poses" / f"{ligand['name']}.sdf"
        for pose, rmsd in zip(Chem.SDMolSupplier(str(path)), ligand["rmsds"], strict=True):
            at, there = (mol.GetConformer().GetPositions() for mol in (pose, reference))
            by_hand = min(
                math.sqrt(((at[list(match)] - there) ** 2).sum(-1).mean())
                for match in pose.GetSubstructMatches(reference, uniquify=False)
            )
            assert rmsd == pytest.approx(by_hand, abs=1e-3)  # written with three digits


def test_every_combination_gives_what_its_formula_says(ran):
    names = {name for name in registry.names() if registry.get(name).pose_columns is None}
    assert set(ran.figures["combinations"]) == names
    assert not ran.figures["refused"]
    formulas = {
        "mean": lambda y: y.mean(),
        "boltzmann": lambda y: (np.exp(-y / KT) * y).sum() / np.exp(-y / KT).sum(),
        "min": lambda y: -KT * np.log(np.exp(-y / KT).mean()),
        "max": lambda y: KT * np.log(np.exp(y / KT).mean()),
    }
    for name, formula in formulas.items():
        for score, ligand in zip(
            ran.figures["combinations"][name]["scores"], ran.figures["ligands"], strict=True
        ):
            assert score == pytest.approx(formula(np.array(ligand["energies"])), rel=1e-9)
        assert name in ran.printed


def test_figures_and_protein_are_written(ran):
    for name in ("docking.png", "poses.png"):
        assert (ran.folder / "tyk2" / name).read_bytes().startswith(b"\x89PNG")
    assert "ATOM" in (ran.folder / "tyk2" / "protein.pdb").read_text()
    assert ran.errors == ""


def test_a_second_run_takes_the_poses_that_are_there_and_docks_a_damaged_one_again(ran):
    first, second = (ligand["name"] for ligand in ran.figures["ligands"])
    poses = ran.folder / "tyk2" / "poses"
    before = {name: (poses / f"{name}.sdf").read_text() for name in (first, second)}
    untouched = (poses / f"{first}.sdf").stat().st_mtime_ns
    (poses / f"{second}.sdf").write_text(before[second][:-100])

    done = run(ran.folder, *SMALL, "--json", "again.json")
    assert done.code == 0, done.printed + done.errors
    again = json.loads((ran.folder.parent / "again.json").read_text())
    assert (again["docked"], again["kept"]) == (1, 1)
    assert (poses / f"{first}.sdf").stat().st_mtime_ns == untouched
    assert (poses / f"{second}.sdf").read_text() == before[second], (
        "another result on the same seed"
    )
    assert again["combinations"] == ran.figures["combinations"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"made_with": {}}', None], ids=repr)
def test_a_record_that_is_damaged_or_gone_is_not_believed(example, tmp_path, damage):
    store = a_store(example, tmp_path)
    ligand = store.system.ligands[0]
    assert store.load(ligand) is None
    store.save(ligand, sdf_of(example, ligand))
    assert store.load(ligand).energies == (-7.5,)
    record = store.path(ligand).with_suffix(".json")
    record.unlink() if damage is None else record.write_text(damage)
    assert store.load(ligand) is None


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"n_poses": 2}, {"exhaustiveness": 3}],
    ids=lambda change: next(iter(change)),
)
def test_poses_of_another_search_are_not_taken(example, tmp_path, change):
    store = a_store(example, tmp_path)
    ligand = store.system.ligands[0]
    store.save(ligand, sdf_of(example, ligand))
    other = {"exhaustiveness": 1, "n_poses": 1, "seed": 0} | change
    assert (
        example.dock.Store(tmp_path, store.system, example.dock.Search(**other)).load(ligand)
        is None
    )


def a_store(example, folder):
    search = example.dock.Search(exhaustiveness=1, n_poses=1, seed=0)
    return example.dock.Store(folder, example.systems.load_system("thrombin"), search)


def sdf_of(example, ligand):
    """The reference pose, as if docked."""
    return example.dock._sdf(Chem.Mol(ligand.reference), ligand, [-7.5])


def test_a_pose_on_the_reference_has_an_rmsd_of_zero(example, tmp_path):
    store = a_store(example, tmp_path)
    poses = store.save(store.system.ligands[0], sdf_of(example, store.system.ligands[0]))
    assert poses.rmsds == (0.0,)


def test_every_target_has_ligands_with_names_of_their_own_inside_the_box(example):
    for target in example.systems.FILES:
        system = example.systems.load_system(target)
        assert len(system.ligands) > 10
        assert not system.unread
        assert len({ligand.file_name for ligand in system.ligands}) == len(system.ligands)
        low, high = (
            np.array(system.box.center) + sign * np.array(system.box.size) / 2 for sign in (-1, 1)
        )
        for ligand in system.ligands:
            assert -16 < ligand.delta_g < -3  # kcal/mol
            positions = ligand.reference.GetConformer().GetPositions()
            assert (positions > low).all()
            assert (positions < high).all()


def test_ligands_that_cannot_be_read_are_named(example, tmp_path):
    good = Chem.MolFromSmiles("CCO")
    good.SetProp("_Name", "good")
    good.SetProp("r_user_dG.exp", "-7.0")
    text = Chem.SDWriter.GetText(good)
    path = tmp_path / "ligands.sdf"
    path.write_text(
        text
        + text.replace("good", "no number").replace("-7.0", "?")
        + "broken\n\n\nnonsense\nM  END\n$$$$\n"
    )
    ligands, unread = example.systems.read_ligands(path)
    assert [ligand.name for ligand in ligands] == ["good"]
    assert unread == ("no number", "broken")


class Deadly:
    """A ligand whose arrival ends the process that should dock it."""

    name = file_name = "deadly"

    def __reduce__(self):
        return os._exit, (1,)


def test_ligands_that_cannot_be_docked_are_named_and_the_others_are_docked(example, ran, tmp_path):
    system = example.systems.load_system("tyk2")
    store = example.dock.Store(tmp_path, system, example.dock.Search(1, 1, seed=0))
    odd = example.systems.Ligand("platinum", -1.0, Chem.AddHs(Chem.MolFromSmiles("C[Pt]C")))
    good = system.ligands[0]
    receptor = ran.folder / "tyk2" / "receptor.pdbqt"
    outcomes = list(example.dock.dock_all([odd, Deadly(), good], store, receptor, processes=2))
    failed = {each.ligand.name: each.reason for each in outcomes if not hasattr(each, "poses")}
    assert set(failed) == {"platinum", "deadly"}
    assert "process died" in failed["deadly"]
    assert failed["platinum"]
    assert store.load(good) is not None
    assert not multiprocessing.active_children()


def all_have_ended(group, deadline):
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)  # the last one waits for init to take note of it
    return False


def test_ctrl_c_ends_it_at_once_and_leaves_no_process(tmp_path):
    long = ["--ligands", "2", "--exhaustiveness", "500", "--output", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / "demo.py"), *long],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,  # a terminal sends Ctrl-C to all of its processes
        # A shell starts what it runs in the background with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    receptor = tmp_path / "tyk2" / "receptor.pdbqt"
    deadline = time.monotonic() + 120
    while not receptor.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(5)  # while processes start, Ctrl-C waits for the next one
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it would dock for an hour
        process.communicate()
        raise
    assert process.returncode == 130
    assert errors == "interrupted\n"
    assert all_have_ended(process.pid, deadline=time.monotonic() + 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "tyk3"], "invalid choice: 'tyk3'"),
        (["--poses", "0"], "must be at least 1; found 0"),
        (["--seed", "-1"], "must be at least 0; found -1"),
        (["--seed", f"{2**31 - 1}"], "must be at most 2147483646; found 2147483647"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_arguments_that_make_no_sense_are_refused(example, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example.demo.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_data_name_the_command_that_installs_them(example, monkeypatch, tmp_path, capsys):
    def not_installed(name):
        raise example.systems.PackageNotFoundError(name)

    monkeypatch.setattr(example.systems, "distribution", not_installed)
    assert example.demo.main(["--output", str(tmp_path)]) == 1
    assert "pip install --no-deps openmmforcefields" in capsys.readouterr().out


def test_a_residue_without_template_is_an_error_and_is_asked_of_no_server(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import pathlib
from dataclasses import replace
from dock import ReceptorError, prepare_receptor
from systems import load_system
system = load_system("thrombin")
system = replace(system, protein=system.protein.replace("GLY", "Q7Q"))
try:
    prepare_receptor(system, pathlib.Path({str(tmp_path / "receptor.pdbqt")!r}))
except ReceptorError as error:
    print(error)
"""
    printed = subprocess.check_output([sys.executable, "-c", code], encoding="utf-8")
    assert printed == "thrombin: meeko has no template for ['Q7Q']\n"


class Sharpest(Combination):
    """Depth 1, no argument of the example."""

    def combine(self, predictions):
        return 2 * predictions.amin()


class OnlyPositive(Combination):
    domain = (0.0, math.inf)

    def combine(self, predictions):
        return predictions.pow(3).mean().pow(1 / 3)


class Raising(Combination):
    def combine(self, predictions):
        if (predictions == -7.0).any():  # which the gate does not try
            return {}["absent"]
        return predictions.mean()


class NotFinite(Combination):
    def combine(self, predictions):
        return predictions.mean() + torch.where((predictions == -7.0).any(), math.nan, 0.0)


class Wrong(Combination):
    def combine(self, predictions):
        return predictions.mean()

    def pose_weights(self, predictions):
        return torch.ones_like(predictions)


def test_a_third_party_is_combined_with_and_one_that_cannot_be_is_named(example):
    others = {"sharpest": Sharpest, "positive": OnlyPositive, "wrong": Wrong}
    later = {"raising": Raising, "not-finite": NotFinite}
    with registry.temporary(others | later):
        results, refused = example.combine.combine_all(docked(example, (-7.0, -6.0), (-5.0,)))
    assert results["sharpest"].scores.tolist() == [-14.0, -10.0]
    assert [weights.tolist() for weights in results["sharpest"].weights] == [[2.0, 0.0], [2.0]]
    assert set(refused) == {"positive", "wrong", *later}
    assert "between 0 and inf" in refused["positive"]
    assert refused["raising"] == "'absent'"
    assert "not finite" in refused["not-finite"]


def test_the_arguments_are_those_that_a_combination_takes(example):
    results, _ = example.combine.combine_all(docked(example, (-7.0, -6.0)))
    assert {name: results[name].arguments for name in ("mean", "min", "max", "boltzmann")} == {
        "mean": {},
        "min": {"pred_scale": 1 / KT, "normalize": True},
        "max": {"pred_scale": 1 / KT, "normalize": True},
        "boltzmann": {"kT": KT},
    }


def test_weights_are_the_softmax_and_the_derivative_of_the_boltzmann_mean(example):
    energies = np.array([-7.0, -6.5, -4.0])
    results, _ = example.combine.combine_all(docked(example, tuple(energies)))
    p = np.exp(-energies / KT) / np.exp(-energies / KT).sum()
    # float64, another order of additions
    np.testing.assert_allclose(results["min"].weights[0], p, rtol=1e-9)
    by_hand = p * (1 + ((p * energies).sum() - energies) / KT)
    np.testing.assert_allclose(results["boltzmann"].weights[0], by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("pearson", scipy.stats.pearsonr),
        ("spearman", scipy.stats.spearmanr),
        ("kendall", scipy.stats.kendalltau),
    ],
)
def test_a_correlation_is_that_of_scipy(example, random, name, theirs, ties):
    x, y = random.normal(size=(2, 3, 12))
    if ties:
        x, y = x.round(), y.round()
    ours = getattr(example.agreement, name)(x, y)
    expected = [theirs(*pair).statistic for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-15)


def test_what_does_not_vary_has_no_correlation(example):
    x, constant = np.arange(6.0), np.full(6, 0.1)  # whose mean is not 0.1 to the last digit
    for name in ("pearson", "spearman", "kendall"):
        assert np.isnan(
            example.agreement.bootstrap(getattr(example.agreement, name), x, constant)
        ).all()


def test_the_interval_is_that_of_scipys_percentile_bootstrap(example, random):
    x = random.normal(size=60)
    y = x + random.normal(size=60)
    ours = example.agreement.bootstrap(example.agreement.pearson, x, y)
    theirs = scipy.stats.bootstrap(
        (x, y),
        lambda a, b, axis: example.agreement.pearson(a, b),
        paired=True,
        method="percentile",
        n_resamples=2000,
        random_state=np.random.default_rng(2),
    ).confidence_interval
    assert ours.low < ours.value < ours.high
    # Two sets of draws: their quantiles scatter by some 0.005.
    np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), atol=0.03)


def test_few_pairs_have_a_value_and_no_interval(example):
    x, y = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 5.0])
    estimate = example.agreement.bootstrap(example.agreement.rmse, x, y)
    assert estimate.value == pytest.approx(math.sqrt(4 / 3))
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_the_line_through_the_others_is_numpys(example, random):
    score, measured = random.normal(size=(2, 8))
    predicted = example.agreement.fitted_to_the_others(score, measured)
    for left_out in range(8):
        others = np.arange(8) != left_out
        line = np.polyfit(score[others], measured[others], 1)
        assert predicted[left_out] == pytest.approx(np.polyval(line, score[left_out]))


def test_no_line_goes_through_one_point(example):
    two = np.array([1.0, 2.0])
    assert np.isnan(example.agreement.fitted_to_the_others(two, two)).all()
    assert np.isnan(example.agreement.mean_of_the_others(two[:1])).all()
    assert example.agreement.mean_of_the_others(two).tolist() == [2.0, 1.0]
