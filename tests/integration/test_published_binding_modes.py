"""``mtenn combine`` returns published binding free energies from those of the binding modes.

A guest binds cyclodextrin in two orientations that do not interconvert within a simulation: out of
the primary (p) or the secondary (s) opening. Slochower et al. [1]_ compute each on its own, and
combine them as ΔG = -RT ln(exp(-ΔG_p/RT) + exp(-ΔG_s/RT)). They report the mean and the deviation
of 100,000 such values, in which each ΔG has a normal error of its own.

The numbers below are those of their analysis [2]_ with the force field GAFF v1.7, whose simulations
are those of Henriksen and Gilson [3]_, rounded to 10⁻⁴ kcal/mol. They were chosen for no reason but
variety: both hosts, the three kinds of guests, and modes of nearly equal and of different weights.

References
----------
.. [1] D. R. Slochower et al., J. Chem. Theory Comput. 15, 6225 (2019), doi:10.1021/acs.jctc.9b00748
.. [2] github.com/slochower/smirnoff-host-guest-simulations, commit 9e15b877, the files
   results/computational_deltaG_by_orientation.csv and results/computational_deltaG.csv
.. [3] N. M. Henriksen and M. K. Gilson, J. Chem. Theory Comput. 13, 4253 (2017),
   doi:10.1021/acs.jctc.7b00359
"""

from __future__ import annotations

import csv
import io
import math

import pytest
import torch
from click.testing import CliRunner

from mtenn_core._cli import main

RT = 0.0019872 * 298.15
# Host and guest, ΔG and its error for p and for s, and the published combined ΔG and its error, all
# in kcal/mol.
PUBLISHED = {
    "a-bam": (-0.0161, 0.2348, -0.6170, 0.2703, -0.8164, 0.2030),
    "a-but": (-0.3350, 0.3121, -0.8463, 0.2554, -1.0822, 0.2126),
    "a-chp": (0.2635, 0.2697, -1.6652, 0.2540, -1.7058, 0.2445),
    "a-coc": (0.3427, 0.3080, -1.8421, 0.2510, -1.8413, 0.2519),
    "a-ham": (-2.2582, 0.2444, -2.1776, 0.2428, -2.6544, 0.1743),
    "a-hep": (-2.8243, 0.2456, -3.8065, 0.2372, -3.9101, 0.1999),
    "a-hp6": (-2.8687, 0.2382, -2.9889, 0.2454, -3.3736, 0.1781),
    "a-oam": (-3.9816, 0.2408, -3.7845, 0.2399, -4.3238, 0.1729),
    "a-oct": (-3.0258, 0.2536, -4.8115, 0.2585, -4.8478, 0.2444),
    "b-cbu": (-0.2885, 0.3534, -1.5484, 0.4077, -1.6488, 0.3527),
    "b-chp": (-2.8406, 0.3531, -2.7793, 0.3438, -3.2745, 0.2519),
    "b-m4t": (-2.9482, 0.3639, -3.1194, 0.3499, -3.4950, 0.2668),
    "b-mha": (-1.0083, 0.3577, -1.3749, 0.3513, -1.6794, 0.2724),
    "b-oam": (-1.9879, 0.3576, -2.4950, 0.3475, -2.7526, 0.2713),
    "b-pb4": (-1.8739, 0.3868, -3.2669, 0.3922, -3.3491, 0.3597),
}
# The nodes and weights of Gauss and Hermite for a mean over normal errors. With 16 for each mode,
# the mean is right to 1e-6.
N_NODES = 16


def combine(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("guest", "mode", "dG", "sem"), *rows])
    given = ["min", "--arg", f"pred_scale={1 / RT}", "--error-column", "sem", "--pose", "mode"]
    command = ["combine", str(path), *given, "--by", "guest", "--column", "dG"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return {row["compound"]: row for row in csv.DictReader(io.StringIO(result.stdout))}


def nodes():
    """Return the places in units of the error, and the weights, which sum to 1.

    They are the eigenvalues of the Jacobi matrix of the Hermite polynomials, and the squares of the
    first numbers of its eigenvectors (Golub and Welsch, Math. Comp. 23, 221 (1969)).
    """
    beside = torch.arange(1, N_NODES, dtype=torch.float64).sqrt()
    matrix = torch.diag(beside, 1) + torch.diag(beside, -1)
    places, vectors = torch.linalg.eigh(matrix)
    return places.tolist(), vectors[0].square().tolist()


def test_the_mean_over_the_errors_is_the_published_free_energy(tmp_path):
    places, node_weights = nodes()
    rows, weights = [], {}
    for guest, (p, p_error, s, s_error, *_) in PUBLISHED.items():
        for i, x in enumerate(places):
            for j, y in enumerate(places):
                name = f"{guest} {i} {j}"
                weights[name] = node_weights[i] * node_weights[j]
                rows.append((name, "p", p + p_error * x, p_error))
                rows.append((name, "s", s + s_error * y, s_error))
    found = combine(tmp_path / "modes.csv", rows)
    for guest, (*_, published, published_error) in PUBLISHED.items():
        own = [name for name in weights if name.startswith(f"{guest} ")]
        values = {name: float(found[name]["prediction"]) for name in own}
        mean = math.fsum(weights[name] * values[name] for name in own)
        variance = math.fsum(weights[name] * (values[name] - mean) ** 2 for name in own)
        # Both are means of 100,000 draws, whose own errors are about 0.3 / √100,000 = 0.001.
        assert mean == pytest.approx(published, abs=0.01), guest
        assert math.sqrt(variance) == pytest.approx(published_error, abs=0.01), guest


def test_the_free_energy_and_its_error_to_first_order_are_close_to_the_published_ones(tmp_path):
    modes = PUBLISHED.items()
    rows = [(guest, "p", p, p_error) for guest, (p, p_error, *_) in modes]
    rows += [(guest, "s", s, s_error) for guest, (_, _, s, s_error, *_) in modes]
    found = combine(tmp_path / "modes.csv", rows)
    assert list(found) == list(PUBLISHED)
    for guest, (p, p_error, s, s_error, published, published_error) in modes:
        value, error = (float(found[guest][key]) for key in ("prediction", "error"))
        w = 1 / (1 + math.exp((p - s) / RT))
        # Errors lower the mean of the smooth minimum: see propagated_error.
        fall = w * (1 - w) * (p_error**2 + s_error**2) / (2 * RT)
        assert value - fall == pytest.approx(published, abs=0.01), guest
        assert error == pytest.approx(published_error, rel=0.1), guest
