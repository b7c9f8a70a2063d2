"""Labels as pose inputs: the suite probes them with small integers."""

import pytest
import torch
from bank import RIGHT, make_right
from bank.right import (
    BestDocked,
    ClustersAndScores,
    CrystalPosesCountMore,
    InverseSizeOfClusters,
    LowestOfClusters,
    MeanOfClusters,
    MeanOfClustersByIndex,
    NonNegativeWeights,
    ScoreWeighted,
    WeightsWithinChains,
)
from tiers import slow

from mtenn_core import Combination
from mtenn_core.testing import check_combination
from mtenn_core.testing._probe.subject import Subject

WITH_LABELS = [right.name for right in RIGHT if "label" in right.name]


def integers(combination, name, seed=0):
    """Return the integers that the suite uses for a pose input, or None for fractions."""
    numbers = Subject(combination, seed).probes.poses(12).inputs[name]
    return sorted(numbers.unique().tolist()) if (numbers == numbers.round()).all() else None


@pytest.mark.parametrize("seed", [5, *slow(*range(6, 26), reason="whole suites")])
@pytest.mark.parametrize("name", WITH_LABELS)
def test_right_combinations_with_labels_pass(name, seed):
    report = check_combination(make_right(name), seed=seed)
    assert report.passed, str(report)


class Table(Combination):
    """Looks up a factor for each label."""

    pose_inputs = ("chain",)
    first, size = 0, 3

    def combine(self, predictions, chain):
        row = chain.long() - self.first
        if not ((row >= 0) & (row < self.size)).all():
            raise IndexError("no such chain")
        return (predictions * torch.tensor([1.0, 0.5, 0.2]).to(predictions)[row]).sum()


@pytest.mark.parametrize(
    ("first", "size", "expected"),
    [(0, 3, [0, 1, 2]), (0, 2, [0, 1]), (1, 3, [1, 2, 3]), (1, 2, [1, 2]), (-1, 3, [0, 1])],
)
def test_a_label_that_is_an_index_gets_integers_within_its_table(first, size, expected):
    cls = type("Table", (Table,), {"first": first, "size": size})
    assert integers(cls(), "chain") == expected
    assert check_combination(cls(), only=["A2", "B1", "C1", "D3", "D5"]).passed


class RanksAndStates(Combination):
    """Ranks start at 1, and there are two states, numbered from 0."""

    pose_inputs = ("rank", "state")

    def combine(self, predictions, rank, state):
        penalties = torch.tensor([0.0, 1.4]).to(predictions)
        return ((predictions + penalties[state.long()]) / rank).sum() / (1 / rank).sum()


@pytest.mark.parametrize(
    "pose_inputs", [("rank", "state"), {"rank": "label", "state": "label"}], ids=["names", "kinds"]
)
def test_two_labels_may_need_different_integers(pose_inputs):
    cls = type("RanksAndStates", (RanksAndStates,), {"pose_inputs": pose_inputs})
    assert integers(cls(), "state") == [0, 1]
    assert check_combination(cls()).passed


def test_a_label_that_is_compared_gets_integers():
    assert integers(LowestOfClusters(), "cluster") == [0, 1, 2]


@pytest.mark.parametrize(
    "combination", [MeanOfClusters, MeanOfClustersByIndex, InverseSizeOfClusters]
)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_poses", [1, 8, 9])
def test_a_label_that_only_groups_poses_gets_integers(combination, seed, min_poses):
    combination = type("Grouping", (combination,), {"min_poses": min_poses})()
    assert integers(combination, "cluster", seed) == [0, 1, 2]


def test_weights_whose_sum_must_not_be_0_get_integers_from_1_on():
    assert integers(NonNegativeWeights(), "weight") == [1, 2, 3]


def test_labels_are_not_changed_by_a_digit_in_low_precision():
    seen = set()

    class Watched(CrystalPosesCountMore):
        def combine(self, predictions, is_crystal):
            seen.update(is_crystal.tolist())
            return super().combine(predictions, is_crystal)

    assert check_combination(Watched(), only=["D4"]).passed
    assert not any(0 < abs(number - round(number)) < 1e-5 for number in seen)


@pytest.mark.parametrize("combination", [ScoreWeighted, BestDocked])
@pytest.mark.parametrize("seed", range(5))
def test_a_number_gets_fractions(combination, seed):
    assert integers(combination(), "docking_score", seed) is None


def test_a_label_and_a_score_are_told_apart():
    assert integers(ClustersAndScores(), "cluster") == [0, 1, 2]
    assert integers(ClustersAndScores(), "docking_score") is None


def test_a_score_that_has_no_effect_without_a_label_gets_fractions():
    assert integers(WeightsWithinChains(), "chain") == [0, 1, 2]
    assert integers(WeightsWithinChains(), "score") is None


def test_no_label_below_the_highest_is_missing():
    poses = Subject(LowestOfClusters(), 0).probes.poses
    for n_poses in range(1, 9):
        labels = poses(n_poses).inputs["cluster"].unique().tolist()
        assert labels == list(range(min(n_poses, 3)))


def test_a_label_that_is_ignored_is_still_reported():
    class Ignored(Combination):
        pose_inputs = ("cluster",)

        def combine(self, predictions, cluster):
            return predictions.mean() + 0 * torch.nn.functional.one_hot(cluster.long()).sum()

    (record,) = check_combination(Ignored(), only=["D5"]).failures
    assert "pose input 'cluster'" in record.reason
    assert "ignored" in record.cause


def test_wrong_weights_are_found_if_there_is_a_label():
    class Wrong(LowestOfClusters):
        def pose_weights(self, predictions, cluster):
            return 1.01 * super().pose_weights(predictions, cluster=cluster)

    (record,) = check_combination(Wrong(), only=["C1"]).failures
    assert "constant factor" in record.cause
