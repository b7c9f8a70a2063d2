"""``mtenn combine``: values, order, weights and errors of a table, and every message."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

import polars
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtenn_core import Combination, registry
from mtenn_core._cli import main
from mtenn_core._tables import delimited, rows

kT = 0.593
TABLE = """\
compound,pose,score,sd,strain
A,1,-7.0,0.3,0.5
B,1,-6.0,0.2,0.1
A,2,-6.5,0.3,1.5
A,3,-5.0,1.0,0.0
B,2,-6.1,0.5,2.5
"""
SCORES = {"A": [-7.0, -6.5, -5.0], "B": [-6.0, -6.1]}
DEVIATIONS = {"A": [0.3, 0.3, 1.0], "B": [0.2, 0.5]}
STRAINS = {"A": [0.5, 1.5, 0.0], "B": [0.1, 2.5]}


class Boltzmann(Combination):
    def __init__(self, kT=1.0):
        super().__init__()
        if kT <= 0:
            raise ValueError(f"kT must be positive; found {kT}")
        self.kT = kT

    def combine(self, predictions):
        return (torch.softmax(-predictions / self.kT, 0) * predictions).sum()


class Function(torch.autograd.Function):
    @staticmethod
    def forward(pred_list, grad_dict, param_names, *model_params):
        return torch.stack(pred_list).square().mean()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.predictions, ctx.grad_dict, ctx.names, *_ = inputs

    @staticmethod
    def backward(ctx, grad_output):
        y = torch.stack(ctx.predictions)
        weights = grad_output * 2 * y / len(y)
        sums = [torch.einsum("i,i...", weights, torch.stack(ctx.grad_dict[n])) for n in ctx.names]
        return None, None, None, *sums


class Mean(Combination):
    def combine(self, predictions):
        return predictions.mean()


class Forward(Combination):
    """It defines only forward: the mean of the squares."""

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return Function.apply(pred_list, grad_dict, param_names, *model_params)


class Strained(Combination):
    pose_inputs = ("strain",)

    def combine(self, predictions, strain):
        return (predictions + strain).mean()


class Degenerate(Combination):
    pose_inputs = {"degeneracy": "positive"}  # noqa: RUF012

    def combine(self, predictions, degeneracy):
        return (predictions * degeneracy).sum() / degeneracy.sum()


class Pair(Combination):
    pose_columns = ("energy", "confidence")

    def combine(self, predictions):
        energies, confidences = predictions.unbind(1)
        return (energies * torch.softmax(confidences, 0)).sum()


class Vector(Combination):
    pose_columns = "any"

    def combine(self, predictions):
        return predictions.mean(0)


class Spread(Combination):
    min_poses = 2

    def combine(self, predictions):
        return predictions.square().mean() - predictions.mean().square()


class PowerMean(Combination):
    domain = (0.0, math.inf)

    def combine(self, predictions):
        return predictions.pow(1.5).mean().pow(1 / 1.5)


class Failing(Boltzmann):
    def combine(self, predictions):
        if len(predictions) == 2 and float(predictions.detach()[0]) == -6.0:
            raise RuntimeError("no luck")
        return super().combine(predictions)


COMBINATIONS = {
    "boltzmann": Boltzmann,
    "the-mean": Mean,
    "forward-only": Forward,
    "strained": Strained,
    "degenerate": Degenerate,
    "pair": Pair,
    "vector": Vector,
    "spread": Spread,
    "power-mean": PowerMean,
    "failing": Failing,
}


@pytest.fixture(scope="module", autouse=True)
def _combinations():
    with registry.temporary(COMBINATIONS):
        yield


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "poses.csv").write_text(TABLE)
    with chdir(tmp_path):
        yield tmp_path


def combine(*arguments, by="compound", column="score"):
    """Run the command on poses.csv, unless the first argument is another table."""
    table = ["poses.csv"]
    if arguments and Path(arguments[0]).suffix in (".csv", ".tsv", ".parquet", ".sdf"):
        table, arguments = [arguments[0]], arguments[1:]
    columns = ["--column", column] if column else []
    given_by = ["--by", by] if by else []
    result = CliRunner().invoke(main, ["combine", *table, *arguments, *given_by, *columns])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert "Traceback" not in result.output
    return result


def results(*arguments, **options):
    """Return the rows that the command prints, as dicts with numbers."""
    result = combine(*arguments, **options)
    assert result.exit_code == 0, result.output
    return read_csv(result.stdout)


def read_csv(text):
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    return [{k: v if k == "compound" else float(v) for k, v in row.items()} for row in found]


def error(*arguments, **options):
    """Return the error that the command prints."""
    result = combine(*arguments, **options)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert not result.stdout
    return result.stderr.removeprefix("error: ").rstrip("\n")


def boltzmann(y):
    """Return the Boltzmann mean and its derivatives from the formulas."""
    factors = [math.exp(-(x - min(y)) / kT) for x in y]
    populations = [f / math.fsum(factors) for f in factors]
    mean = math.fsum(p * x for p, x in zip(populations, y, strict=True))
    return mean, [p * (1 + (mean - x) / kT) for p, x in zip(populations, y, strict=True)]


BOLTZMANN = ("boltzmann", "--arg", f"kT={kT}")
# The formulas above sum a handful of numbers near 7, with a roundoff of about 1e-15 each.
CLOSE = {"rel": 1e-12, "abs": 1e-12}


def test_results_follow_the_formulas_in_the_order_of_first_appearance(folder):
    found = results(*BOLTZMANN, "--error-column", "sd")
    assert [row["compound"] for row in found] == ["A", "B"]
    for row, (name, y) in zip(found, SCORES.items(), strict=True):
        value, w = boltzmann(y)
        variance = math.fsum((a * s) ** 2 for a, s in zip(w, DEVIATIONS[name], strict=True))
        kish = math.fsum(w) ** 2 / math.fsum(a * a for a in w)
        assert list(row) == ["compound", "prediction", "error", "effective_poses", "poses"]
        expected = {"prediction": value, "error": math.sqrt(variance), "effective_poses": kish}
        assert {key: row[key] for key in expected} == pytest.approx(expected, **CLOSE)
        assert row["poses"] == len(y)


def test_weights_stand_in_the_row_of_their_pose_and_sum_to_1(folder):
    results(*BOLTZMANN, "--weights", "weighted.csv")
    written = (folder / "weighted.csv").read_text().splitlines()
    expected = {name: iter(boltzmann(y)[1]) for name, y in SCORES.items()}
    sums = dict.fromkeys(SCORES, 0.0)
    for line, original in zip(written[1:], TABLE.splitlines()[1:], strict=True):
        before, _, weight = line.rpartition(",")
        assert before == original
        assert float(weight) == pytest.approx(next(expected[line[0]]), **CLOSE)
        sums[line[0]] += float(weight)
    assert written[0] == "compound,pose,score,sd,strain,weight"
    assert sums == pytest.approx(dict.fromkeys(SCORES, 1.0), **CLOSE)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("mark", ["\r", "\n", "\r\n", '"', ",", "\t"], ids=repr)
def test_a_field_of_several_lines_is_one_field_next_to_the_weights(folder, mark, suffix):
    rows = [["compound", "score", f"a{mark}b"], [f"c{mark}", "0.5", f"{mark}d"]]
    tables = [folder / f"{name}{suffix}" for name in ("rows", "weighted")]
    delimiter = "\t" if suffix == ".tsv" else ","
    with tables[0].open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(rows)
    results(str(tables[0]), "the-mean", "--weights", str(tables[1]))
    with tables[1].open(newline="") as file:
        found = list(csv.reader(file, delimiter=delimiter))
    assert found == [[*rows[0], "weight"], [*rows[1], "1.0"]]


def test_batches_give_the_same_results(folder, monkeypatch):
    at_once = results(*BOLTZMANN, "--error-column", "sd")
    monkeypatch.setattr("mtenn_core._tables.combining.LARGEST_BATCH", 2)
    assert results(*BOLTZMANN, "--error-column", "sd") == at_once


def test_a_combination_that_defines_only_forward_works(folder):
    found = results("forward-only", "--error-column", "sd")
    for row, (name, y) in zip(found, SCORES.items(), strict=True):
        w = [2 * x / len(y) for x in y]
        variance = math.fsum((a * s) ** 2 for a, s in zip(w, DEVIATIONS[name], strict=True))
        assert row["prediction"] == pytest.approx(math.fsum(x * x for x in y) / len(y), **CLOSE)
        assert row["error"] == pytest.approx(math.sqrt(variance), **CLOSE)


@pytest.mark.parametrize("option", ["strain", "strain=strain"])
def test_pose_inputs_come_from_columns(folder, option):
    found = results("strained", "--pose-input", option)
    for row, (name, y) in zip(found, SCORES.items(), strict=True):
        expected = math.fsum(y + STRAINS[name]) / len(y)
        assert row["prediction"] == pytest.approx(expected, **CLOSE)


def test_several_numbers_of_a_pose_come_from_several_columns(folder):
    weights = ("--weights", "weighted.csv", "--error-column", "sd", "--error-column", "sd")
    found = results("pair", "--column", "strain", *weights)
    written = list(csv.DictReader(io.StringIO((folder / "weighted.csv").read_text())))
    assert list(written[0])[-2:] == ["weight_strain", "weight_score"]
    for row, name in zip(found, SCORES, strict=True):
        y = torch.tensor([STRAINS[name], SCORES[name]], dtype=torch.float64).T.requires_grad_()
        value = Pair().combine(y)
        (w,) = torch.autograd.grad(value, y)
        own = [r for r in written if r["compound"] == name]
        given = [[float(r["weight_strain"]), float(r["weight_score"])] for r in own]
        assert given == [pytest.approx(pair, **CLOSE) for pair in w.tolist()]
        deviations = torch.tensor(DEVIATIONS[name], dtype=torch.float64)[:, None]
        assert row["error"] == pytest.approx(float((w * deviations).norm()), **CLOSE)
        assert row["prediction"] == pytest.approx(value.item(), **CLOSE)
        assert "effective_poses" not in row


def test_each_number_of_a_vector_has_a_column(folder):
    found = results("vector", "--column", "strain")
    for row, name in zip(found, SCORES, strict=True):
        assert row["prediction_1"] == pytest.approx(math.fsum(STRAINS[name]) / row["poses"])
        assert row["prediction_2"] == pytest.approx(math.fsum(SCORES[name]) / row["poses"])
    document = json.loads(combine("vector", "--column", "strain", "--json").stdout)
    assert document["compounds"][0]["prediction"] == [
        found[0]["prediction_1"],
        found[0]["prediction_2"],
    ]


def as_tsv(path):
    path.write_text(TABLE.replace(",", "\t"))


def as_parquet(path):
    polars.read_csv(io.StringIO(TABLE)).with_columns(
        polars.col("score").cast(polars.Float32)
    ).write_parquet(path)


def as_quoted_csv(path):
    with path.open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(csv.reader(io.StringIO(TABLE)))


def as_csv_of_windows(path):
    path.write_bytes(b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n\r\n").encode())


def as_sdf(path):
    molecules = []
    for row in csv.DictReader(io.StringIO(TABLE)):
        tags = "".join(f">  <{k}>  (1)\n{v}\n\n" for k, v in row.items())
        molecules.append(
            f"{row['compound']}\n  by hand\n\n  0  0  0  0  0  0  0  0  0  0999 V2000\nM "
            f" END\n{tags}$$$$\n"
        )
    path.write_text("".join(molecules))


FORMATS = {
    "poses.tsv": as_tsv,
    "poses.parquet": as_parquet,
    "quoted.csv": as_quoted_csv,
    "windows.csv": as_csv_of_windows,
    "poses.sdf": as_sdf,
}


@pytest.mark.parametrize(("name", "write"), FORMATS.items(), ids=FORMATS)
def test_all_formats_give_the_same_results(folder, name, write):
    write(folder / name)
    given = *BOLTZMANN, "--error-column", "sd", "--pose", "pose"
    # Float32 in the Parquet file: its scores are exact, except -6.1.
    tolerance = {"rel": 1e-6} if name == "poses.parquet" else {"rel": 0}
    found = results(name, *given, "--weights", f"weights{Path(name).suffix}")
    assert found == [
        {k: v if k == "compound" else pytest.approx(v, **tolerance) for k, v in row.items()}
        for row in results(*given)
    ]


def test_the_weights_of_an_sdf_file_are_tags(folder):
    as_sdf(folder / "poses.sdf")
    results("poses.sdf", *BOLTZMANN, "--weights", "weighted.sdf", by="_Name")
    before, after = ((folder / f"{name}.sdf").read_text() for name in ("poses", "weighted"))
    weights = re.findall(r">  <weight>\n(.*)\n\n\$\$\$\$\n", after)
    expected = {name: iter(boltzmann(y)[1]) for name, y in SCORES.items()}
    assert [float(w) for w in weights] == [
        pytest.approx(next(expected[n]), **CLOSE) for n in "ABAAB"
    ]
    assert re.sub(r">  <weight>\n.*\n\n", "", after) == before


MOLECULE = "A\n\n\n  0  0\nM  END\n> <score>\n1.0\n\n> <sd>\n{}\n\n$$$$\n"


def test_an_error_in_an_sdf_file_names_the_line_of_the_tag(folder):
    path = folder / "poses.sdf"
    path.write_text(MOLECULE.format(0.5) + MOLECULE.format("oops"))
    result = combine(str(path), "the-mean", "--error-column", "sd", by="_Name")
    assert result.exit_code == 1
    assert "poses.sdf, line 22, column 'sd'" in result.stderr


def test_text_behind_the_end_of_a_molecule_is_an_error(folder):
    path = folder / "poses.sdf"
    path.write_text(MOLECULE.format(0.5).replace("$$$$", "$$$$nan"))
    result = combine(str(path), "the-mean", by="_Name")
    assert result.exit_code == 1
    assert "line 12: the line $$$$ ends a molecule; found text behind it" in result.stderr


def test_a_tag_that_the_first_molecule_lacks_is_named(folder):
    path = folder / "poses.sdf"
    path.write_text(MOLECULE.format(0.5))
    result = combine(str(path), "the-mean", by="_Name", column="scor")
    assert "the first molecule has no tag <scor>. Did you mean 'score'?" in result.stderr


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_may_have_the_name_of_a_pattern(folder, suffix):
    import polars

    frame = polars.DataFrame({"compound": ["A", "A"], "^x$": [1.0, 3.0]})
    path = folder / f"poses.{suffix}"
    frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    result = combine(str(path), "the-mean", "--json", column="^x$")
    assert json.loads(result.stdout)["compounds"][0]["prediction"] == 2.0


def test_the_tags_of_an_sdf_file_are_those_of_rdkit(folder):
    chem = pytest.importorskip("rdkit.Chem")
    with chem.SDWriter("rdkit.sdf") as writer:
        for number, smiles in enumerate(["CCO", "CCO", "c1ccccc1"]):
            molecule = chem.MolFromSmiles(smiles)
            molecule.SetProp("_Name", smiles)
            molecule.SetDoubleProp("score", -7.0 + number / 3)
            molecule.SetProp("remark", "two\nlines")
            writer.write(molecule)
    expected = [m.GetDoubleProp("score") for m in chem.SDMolSupplier("rdkit.sdf")]
    results("rdkit.sdf", "boltzmann", "--weights", "weighted.sdf", by="_Name")
    molecules = list(chem.SDMolSupplier("weighted.sdf"))
    assert [m.GetDoubleProp("score") for m in molecules] == expected
    assert molecules[2].GetDoubleProp("weight") == 1.0
    assert molecules[0].GetProp("remark") == "two\nlines"


def test_the_weights_of_a_parquet_file_keep_its_types(folder):
    as_parquet(folder / "poses.parquet")
    results("poses.parquet", *BOLTZMANN, "--weights", "weighted.parquet")
    written, before = map(polars.read_parquet, ("weighted.parquet", "poses.parquet"))
    assert written.drop("weight").equals(before)
    assert written.schema["score"] == polars.Float32


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.parquet"])
def test_results_go_to_a_file(folder, name):
    expected = results(*BOLTZMANN)
    result = combine(*BOLTZMANN, "--out", name)
    assert result.stdout == ""
    assert result.stderr == f"wrote {name}: 2 compounds, 5 poses\n"
    readers = {".csv": polars.read_csv, ".parquet": polars.read_parquet}
    read = readers.get(Path(name).suffix, lambda path: polars.read_csv(path, separator="\t"))
    assert read(name).to_dicts() == expected


def test_results_are_rounded_to_significant_digits(folder):
    found = results(*BOLTZMANN, "--error-column", "sd", "--digits", "3")
    assert [row["prediction"] for row in found] == [-6.81, -6.05]
    assert [row["error"] for row in found] == [0.279, 0.304]


def test_json_has_all_results(folder):
    document = json.loads(combine(*BOLTZMANN, "--error-column", "sd", "--json").stdout)
    assert document["compounds"] == results(*BOLTZMANN, "--error-column", "sd")
    assert {k: document[k] for k in ("table", "combination", "arguments", "rows")} == {
        "table": "poses.csv",
        "combination": "boltzmann",
        "arguments": {"kT": "0.593"},
        "rows": 5,
    }


def test_a_terminal_gets_a_table_of_the_first_compounds(monkeypatch):
    monkeypatch.setattr("mtenn_core._cli.combine_results.MAX_SHOWN", 2)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    from mtenn_core._cli.combine_results import show_results

    terminal = Terminal()
    show_results(polars.DataFrame({"compound": ["A", "B", "C"], "poses": [1, 2, 3]}), terminal)
    shown = " ".join(re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()).split())
    assert shown == "compound poses A 1 B 2 … and 1 more. --out FILE writes all"


@pytest.mark.parametrize("name", ["plot.png", "plot.svg", "plot.pdf"])
def test_a_picture_is_written(folder, name):
    combine(*BOLTZMANN, "--error-column", "sd", "--plot", name, "--out", "out.csv")
    written = (folder / name).read_bytes()
    assert len(written) > 5000
    if name == "plot.svg":
        for words in (">A<", ">B<", "boltzmann(kT=0.593) of poses.csv", "1.2 of 3"):
            assert words.encode() in written


def test_a_picture_of_many_compounds_has_no_names(folder):
    lines = [f"name {i},{i % 7},0.5" for i in range(100)]
    (folder / "many.csv").write_text("\n".join(["compound,score,sd", *lines]))
    combine("many.csv", "boltzmann", "--error-column", "sd", "--plot", "p.svg", "--out", "o.csv")
    text = (folder / "p.svg").read_text()
    assert "100 compounds" in text
    assert text.count(">name ") == 10


# Errors ------------------------------------------------------------------------------------------

HEAD = "compound,pose,score,sd,strain\n"
# What is in the file below the header, and what the message must say.
WRONG_ROWS = {
    "text": (
        "A,1,-7,0,0\nA,2,high,0,0\n",
        "line 3, column 'score': the value must be a number; found 'high'",
    ),
    "comma": (
        'A,1,"-7,5",0,0\n',
        "line 2, column 'score': the value must be a number; found '-7,5'. Write a decimal point",
    ),
    "digits": (
        "A,1,1_000,0,0\n",
        "line 2, column 'score': the value must be a number; found '1_000'",
    ),
    "other digits": ("A,1,١,0,0\n", "line 2, column 'score': the value must be a number"),
    "empty": ("A,1,,0,0\n", "line 2, column 'score': the value must be a number; found nothing"),
    "nan": (
        "A,1,-7,0,0\nB,1,nan,0,0\n",
        "line 3, column 'score': the value must be finite; found nan",
    ),
    "null": ("A,1,null,0,0\n", "line 2, column 'score': the value must be a number; found 'null'"),
    "infinite": ("A,1,-inf,0,0\n", "line 2, column 'score': the value must be finite; found -inf"),
    "overflow": ("A,1,1e999,0,0\n", "line 2, column 'score': the value must be finite; found inf"),
    "no name": (
        "A,1,-7,0,0\n,1,-7,0,0\n",
        "line 3, column 'compound': the name of the compound must not be empty; found ''",
    ),
    "blank name": (
        " ,1,-7,0,0\n",
        "line 2, column 'compound': the name of the compound must not be empty; found ' '",
    ),
    "repeated pose": (
        "A,1,-7,0,0\nB,1,-7,0,0\nA,1,-7,0,0\n",
        (
            "line 4, column 'pose': compound 'A' must have each pose once; found pose '1' "
            "again, which is also in line 2"
        ),
    ),
    "repeated pose behind quotes": (
        '"A\nB",1,-7,0,0\n"A\nB",1,-7,0,0\n',
        "line 4, column 'pose': compound 'A\\nB' must have each pose once",
    ),
    "negative": (
        "A,1,-7,-0.1,0\n",
        "line 2, column 'sd': a standard deviation must not be negative; found -0.1",
    ),
    "short line": (
        "A,1,-7,0,0\nA,2,-7,0\n",
        "line 3: each line must have 5 fields, like the first one; found 4",
    ),
    "long line": (
        "A,1,-7,0,0\n\nA,2,-7,0,0,0\n",
        "line 4: each line must have 5 fields, like the first one; found 6",
    ),
    "short and long line": ("A,1,-7,0\nA,2,-7,0,0,0\n", "line 2: each line must have 5 fields"),
    "open quote": ('A,1,-7,0,0\n"A,2,-7,0,0\n', "line 3: the line cannot be split into fields"),
    "no rows": ("", ": the table must have at least one row; found none"),
    "blank lines": ("\n\n", ": the table must have at least one row; found none"),
}


@pytest.mark.parametrize(("body", "message"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_wrong_row_is_named(folder, body, message):
    (folder / "poses.csv").write_text(HEAD + body, encoding="utf-8")
    found = error("boltzmann", "--error-column", "sd", "--pose", "pose", "--out", "out.csv")
    assert found.startswith("poses.csv")
    assert message in found.replace("\n", "\\n")
    assert sorted(os.listdir(folder)) == ["poses.csv"]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        pytest.param(
            {"score": ["high"]},
            "column 'score': the column must hold numbers; its type is String",
            id="text",
        ),
        pytest.param({"score": [True]}, "column 'score': the column must hold numbers", id="bool"),
        pytest.param(
            {"score": [1.0, None]},
            "row 2, column 'score': the value must be a number; found nothing",
            id="null",
        ),
        pytest.param(
            {"score": [1.0, math.nan]},
            "row 2, column 'score': the value must be finite; found nan",
            id="nan",
        ),
        pytest.param(
            {"compound": ["A", None]},
            "row 2, column 'compound': the name of the compound must not be empty; found nothing",
            id="no name",
        ),
        pytest.param(
            {"compound": [["A"], ["B"]]},
            "column 'compound': the column must hold text or numbers",
            id="list",
        ),
        pytest.param(
            {"sd": [0, -1]},
            "row 2, column 'sd': a standard deviation must not be negative; found -1.0",
            id="negative",
        ),
    ],
)
def test_a_wrong_row_of_a_parquet_file_is_named(folder, frame, message):
    n = len(next(iter(frame.values())))
    columns = {"compound": ["A"] * n, "score": [1] * n, "sd": [0] * n} | frame
    polars.DataFrame(columns).write_parquet("poses.parquet")
    found = error("poses.parquet", "boltzmann", "--error-column", "sd")
    assert found.startswith(f"poses.parquet, {message}")


def test_a_parquet_file_that_is_none_is_named(folder):
    (folder / "poses.parquet").write_text(TABLE)
    assert error("poses.parquet", "boltzmann").startswith("poses.parquet: the file is no readable")


SDF = "A\n\n\n  0  0  0  0  0  0  0  0  0  0999 V2000\nM  END\n> <score>\n-7\n\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            SDF.replace("-7", "high"),
            "line 7, column 'score': the value must be a number; found 'high'",
            id="text",
        ),
        pytest.param(
            f"{SDF}$$$$\n{SDF.replace('score', 'other')}$$$$\n",
            "line 10, column 'score': each molecule must have the tag <score>",
            id="lacks the tag",
        ),
        pytest.param(
            f"{SDF}$$$$\n{SDF.replace('A', '', 1)}",
            "line 10, column '_Name': the name of the compound must not be empty",
            id="no name",
        ),
        pytest.param(
            SDF.replace("score", "scores"),
            "the first molecule has no tag <score>. Did you mean 'scores'? Its tags are scores",
            id="no such tag",
        ),
        pytest.param(
            f"{SDF}> <score>\n1\n\n$$$$\n",
            "line 9, column 'score': a molecule must have each tag once",
            id="twice",
        ),
        pytest.param(
            f"{SDF}$$$$\n$$$$\n", "line 10: expected a molecule; found $$$$", id="no molecule"
        ),
        pytest.param("", ": the table must have at least one row; found none", id="empty"),
    ],
)
def test_a_wrong_molecule_is_named(folder, text, message):
    (folder / "poses.sdf").write_text(text)
    found = error("poses.sdf", "boltzmann", by="_Name")
    assert found.startswith("poses.sdf")
    assert message in found


@pytest.mark.parametrize("n_before", [0, 1])
def test_a_molecule_that_already_has_a_weight_is_named(folder, n_before):
    weighted = SDF.replace("> <score>", "> <weight>\n1\n\n> <score>")
    (folder / "poses.sdf").write_text(f"{SDF}$$$$\n" * n_before + f"{weighted}$$$$\n")
    found = error("poses.sdf", "boltzmann", "--weights", "w.sdf", by="_Name")
    line = 7 + 9 * n_before
    assert found.startswith(f"poses.sdf, line {line}, column 'weight': the weights need a tag")
    assert "w.sdf" not in os.listdir(folder)


@pytest.mark.parametrize("name", ["poses.csv", "poses.sdf"])
def test_another_encoding_is_named_with_its_line(folder, name):
    text = TABLE if name == "poses.csv" else f"{SDF}$$$$\n{SDF}"
    line = 3 if name == "poses.csv" else 10
    wrong = text.replace("B,1", "Bé,1") if name == "poses.csv" else f"{SDF}$$$$\né{SDF}"
    (folder / name).write_text(wrong, encoding="latin-1")
    found = error(name, "boltzmann", by="compound" if name == "poses.csv" else "_Name")
    assert (
        found
        == f"{name}, line {line}: the file must be text in UTF-8; found byte 0xe9. Save it as UTF-8"
    )


# Arguments of the command, and what the message must say.
WRONG_ARGUMENTS = {
    "no file": (["absent.csv", "boltzmann"], {}, "absent.csv: there is no such file"),
    "folder": (["folder.csv", "boltzmann"], {}, "folder.csv: the table must be a regular file"),
    "suffix": (
        ["poses.xls", "boltzmann"],
        {},
        (
            "poses.xls: the name of a table must end in one of .csv, .tsv, .parquet, .sdf; "
            "found '.xls'"
        ),
    ),
    "column": (
        ["boltzmann"],
        {"column": "scor"},
        (
            "poses.csv, column 'scor': the table has no such column. Did you mean 'score'? "
            "Its columns are 'compound', 'pose', 'score', 'sd', 'strain'"
        ),
    ),
    "by": (
        ["boltzmann"],
        {"by": "Compounds"},
        "column 'Compounds': the table has no such column. Did you mean 'compound'?",
    ),
    "text column": (
        ["boltzmann"],
        {"column": "compound"},
        "line 2, column 'compound': the value must be a number; found 'A'",
    ),
    "combination": (["boltzman"], {}, "unknown combination 'boltzman'"),
    "argument": (
        ["boltzmann", "--arg", "kt=1"],
        {},
        "got an unexpected keyword argument 'kt'. Did you mean 'kT'? Its arguments are: kT=1.0",
    ),
    "value": (
        ["boltzmann", "--arg", "kT=-1"],
        {},
        (
            "boltzmann cannot be made with these arguments: ValueError: kT must be "
            "positive; found -1. Its arguments are: kT=1.0"
        ),
    ),
    "text as value": (
        ["boltzmann", "--arg", "kT=warm"],
        {},
        "boltzmann cannot be made with these arguments: TypeError",
    ),
    "too few columns": (
        ["pair"],
        {},
        "Pair takes 2 number(s) per pose (energy, confidence); found --column 1 time(s)",
    ),
    "too many columns": (
        ["boltzmann", "--column", "sd"],
        {},
        "Boltzmann takes 1 number(s) per pose; found --column 2 time(s)",
    ),
    "no input": (
        ["strained"],
        {},
        "Strained needs the pose input 'strain'. Name its column with --pose-input strain",
    ),
    "another input": (
        ["boltzmann", "--pose-input", "strain"],
        {},
        "Boltzmann takes no pose input 'strain'; its pose inputs are none",
    ),
    "column of an input": (
        ["strained", "--pose-input", "strain=s"],
        {},
        "column 's': the table has no such column",
    ),
    "errors": (
        ["pair", "--column", "sd", "--error-column", "sd"],
        {},
        "each --column needs its own --error-column; found 2 and 1",
    ),
    "errors of a vector": (
        ["vector", "--error-column", "sd"],
        {},
        "--error-column needs one combined number per compound; vector returns several",
    ),
    "weights of a vector": (
        ["vector", "--weights", "w.csv"],
        {},
        "--weights needs one combined number per compound; vector returns several",
    ),
    "plot of columns": (
        ["pair", "--column", "sd", "--plot", "p.png"],
        {},
        "--plot needs one number per pose; pair takes several",
    ),
    "kind": (
        ["degenerate", "--pose-input", "degeneracy=strain"],
        {},
        "poses.csv, line 5: compound 'A': pose_inputs['degeneracy'] must be a number above 0",
    ),
    "domain": (
        ["power-mean"],
        {},
        (
            "poses.csv, line 2: compound 'A': PowerMean gives nan. It takes predictions "
            "between 0.0 and inf"
        ),
    ),
    "raises": (["failing"], {}, "failing failed: RuntimeError: no luck"),
    "exists": (
        ["boltzmann", "--out", "there.csv"],
        {},
        "there.csv: the file already exists. Choose another name, or replace it with --force",
    ),
    "itself": (
        ["boltzmann", "--weights", "./poses.csv", "--force"],
        {},
        "poses.csv: the output must be another file than the table itself",
    ),
    "twice": (
        ["boltzmann", "--out", "w.csv", "--weights", "w.csv"],
        {},
        "w.csv: two outputs need two files",
    ),
    "no folder": (
        ["boltzmann", "--out", "absent/out.csv"],
        {},
        "absent/out.csv: there is no folder 'absent'",
    ),
    "folder as output": (
        ["boltzmann", "--out", "folder.csv", "--force"],
        {},
        "folder.csv: the output must be a file; found a folder",
    ),
    "suffix of results": (
        ["boltzmann", "--out", "out.sdf"],
        {},
        "out.sdf: the file of --out must end in .csv or .tsv or .parquet",
    ),
    "suffix of weights": (
        ["boltzmann", "--weights", "w.tsv"],
        {},
        "w.tsv: the file of --weights must end in .csv",
    ),
    "suffix of plot": (
        ["boltzmann", "--plot", "p.gif"],
        {},
        "p.gif: the file of --plot must end in .png or .svg or .pdf",
    ),
    "weight exists": (
        ["weighted.csv", "boltzmann", "--weights", "w.csv"],
        {},
        "weighted.csv, line 1, column 'weight': the weights need a column of this name",
    ),
    "same name": (
        ["same.csv", "boltzmann"],
        {},
        (
            "same.csv, line 1, column 'score': the name of a column that is used must be "
            "unique; found 2 columns"
        ),
    ),
    "empty file": (
        ["empty.csv", "boltzmann"],
        {},
        "empty.csv: the table must have at least one row; found none",
    ),
    "few poses": (
        ["few.csv", "spread"],
        {},
        "few.csv, line 4: compound 'B': Spread needs at least 2 pose(s); found 1",
    ),
}


@pytest.mark.parametrize(
    ("arguments", "options", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS
)
def test_a_wrong_argument_is_explained(folder, arguments, options, message):
    (folder / "folder.csv").mkdir()
    (folder / "there.csv").write_text("before")
    (folder / "weighted.csv").write_text("compound,score,weight\nA,1,2\n")
    (folder / "same.csv").write_text("compound,score,score\nA,1,2\n")
    (folder / "few.csv").write_text("compound,score\nA,1\nA,2\nB,2\n")
    (folder / "empty.csv").touch()
    before = sorted(os.listdir(folder))
    if arguments[0] == "poses.xls":
        result = CliRunner().invoke(main, ["combine", *arguments, "--by", "a", "--column", "b"])
        found = result.stderr
    else:
        found = error(*arguments, **options)
    assert message in found
    assert sorted(os.listdir(folder)) == before
    assert (folder / "there.csv").read_text() == "before"


@pytest.mark.parametrize(
    "arguments", [["--arg", "kT"], ["--pose-input", "a", "--pose-input", "a=b"]]
)
def test_a_malformed_option_is_wrong_usage(folder, arguments):
    assert combine("boltzmann", *arguments).exit_code == 2


def test_an_error_is_a_json_document_with_json(folder):
    result = combine("boltzmann", "--json", column="scor")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "TableError"


def test_force_replaces_a_file(folder):
    (folder / "out.csv").write_text("before")
    assert combine(*BOLTZMANN, "--out", "out.csv", "--force").exit_code == 0
    assert read_csv((folder / "out.csv").read_text()) == results(*BOLTZMANN)


def test_a_full_disk_is_named_and_leaves_no_file(folder):
    full = OSError(28, "No space left on device")
    with mock.patch("polars.DataFrame.write_csv", side_effect=full):
        found = error(*BOLTZMANN, "--out", "out.csv")
    assert found == "out.csv: the file cannot be written: No space left on device"
    assert sorted(os.listdir(folder)) == ["poses.csv"]


def test_brackets_in_the_name_of_a_file_have_no_meaning(folder):
    (folder / "poses[1].csv").write_text(TABLE)
    assert results("poses[1].csv", *BOLTZMANN) == results(*BOLTZMANN)


def test_an_error_that_overflows_is_named(folder):
    (folder / "poses.csv").write_text("compound,score,sd\nA,1,0\nB,1,1e200\n")
    found = error(*BOLTZMANN, "--error-column", "sd")
    assert found.startswith("poses.csv, line 3: compound 'B': the error is inf")


@pytest.mark.parametrize("module", ["polars", "numpy"])
def test_a_missing_package_is_named_with_its_extra(folder, module):
    with mock.patch.dict(sys.modules, {module: None}):
        found = error("boltzmann")
    assert (
        f"tables need {module}, which is not installed. Install it with pip install "
        f'"mtenn-core[tables]"'
    ) in found


def test_a_missing_matplotlib_is_named_before_the_work(folder):
    with mock.patch.dict(sys.modules, {"mtenn_core._tables.picture": None}):
        found = error("boltzmann", "--plot", "p.png")
    assert 'pip install "mtenn-core[html]"' in found


@pytest.mark.parametrize("where", ["_combined", "write_weights", "write_results"])
def test_an_interruption_leaves_no_file(folder, where):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    target = "mtenn_core._cli.combine_run._combined"
    if where == "write_weights":
        target = "mtenn_core._tables.delimited.DelimitedTable.write"
    elif where == "write_results":
        target = "polars.DataFrame.write_csv"
    with mock.patch(target, interrupted):
        result = combine(*BOLTZMANN, "--out", "out.csv", "--weights", "w.csv")
    assert result.exit_code == 130
    assert "out.csv" not in os.listdir(folder)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(folder):
    (folder / "locked").mkdir(mode=0o500)
    assert "cannot write into the folder 'locked'" in error("boltzmann", "--out", "locked/out.csv")


@pytest.mark.slow("a new interpreter imports torch")
@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_closed_pipe_ends_the_command_quietly(folder):
    (folder / "rule.py").write_text("")
    lines = [f"{i},{i}" for i in range(50_000)]
    (folder / "many.csv").write_text("\n".join(["compound,score", *lines]))
    program = (
        "from mtenn_core import registry; from mtenn_core._cli import main; import torch\n"
        "from mtenn_core import Combination\n"
        "class Mean(Combination):\n"
        "    def combine(self, predictions): return predictions.mean()\n"
        "with registry.temporary({'the-mean': Mean}): main()\n"
    )
    (folder / "program.py").write_text(program)
    command = (
        f"'{sys.executable}' program.py combine many.csv the-mean --by compound --column score"
    )
    line = f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split() == ["compound,prediction,effective_poses,poses", "141"]
    assert done.stderr == ""


# Fuzzed tables -----------------------------------------------------------------------------------

NAMES = st.text("ABab ,;'\"é\n\t#", min_size=1, max_size=3).filter(str.strip)
PLAIN = st.sampled_from(["A", "B", "compound 3", "é"])
NUMBERS = st.floats(-1e6, 1e6, width=32)
MUTATIONS = {
    "field too few": lambda text, i: cut(text, i, ",", ""),
    "field too many": lambda text, i: cut(text, i, ",", ",x,"),
    "no number": lambda text, i: cut(text, i, ",", ",?"),
    "no digits": lambda text, i: re.sub(rb"\d", b"", text),
    "end of the file missing": lambda text, i: text[:i],
    "quote": lambda text, i: text[:i] + b'"' + text[i:],
    "two quotes": lambda text, i: text[:i] + b'""' + text[i:],
    "return": lambda text, i: text[:i] + b"\r" + text[i:],
    "newline": lambda text, i: text[:i] + b"\n" + text[i:],
    "byte": lambda text, i: text[:i] + b"\xff" + text[i:],
    "zero": lambda text, i: text[:i] + b"\0" + text[i:],
    "delimiter": lambda text, i: text[:i] + b"," + text[i:],
    "twice": lambda text, i: text + text[i:],
    "windows": lambda text, i: text.replace(b"\n", b"\r\n"),
    "nan": lambda text, i: text[:i] + b"nan" + text[i:],
}


def cut(text, i, old, new):
    """Replace the i-th occurrence of a word, counted around."""
    parts = text.split(old.encode())
    i = 1 + i % max(1, len(parts) - 1)
    return old.encode().join(parts[:i]) + new.encode() + old.encode().join(parts[i:])


def written(rows, quoting):
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=quoting, lineterminator="\n")
    writer.writerow(["compound", "score", "pose"])
    writer.writerows([name, repr(number), i] for i, (name, number) in enumerate(rows))
    return file.getvalue().encode()


def means(rows):
    groups = {}
    for name, number in rows:
        groups.setdefault(name, []).append(number)
    return {name: (math.fsum(y) / len(y), len(y)) for name, y in groups.items()}


def read_by_python(data):
    """Return the rows as Python's csv module reads them, or None if a value is wrong."""
    try:
        records = [
            r
            for r in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
            if r
        ]
        head, *body = records
        rows = [(r[head.index("compound")], float(r[head.index("score")])) for r in body]
    except (UnicodeDecodeError, csv.Error, ValueError, IndexError):
        return None
    same = all(len(r) == len(head) for r in body)
    right = all(name.strip() and math.isfinite(number) for name, number in rows)
    return rows if rows and same and right else None


@st.composite
def tables(draw):
    names = draw(st.sampled_from([NAMES, PLAIN]))
    rows = draw(st.lists(st.tuples(names, NUMBERS), min_size=1, max_size=12))
    data = written(rows, draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
    mutations = draw(st.lists(st.sampled_from(sorted(MUTATIONS)), max_size=2))
    for mutation in mutations:
        data = MUTATIONS[mutation](data, draw(st.integers(0, len(data))))
    return data, None if mutations else rows


def check_fuzzed_table(path, data, rows):
    path.write_bytes(data)
    weights = path.with_name("weights.csv")
    result = combine(str(path), "the-mean", "--json", "--weights", str(weights), "--force")
    document = json.loads(result.stdout)
    expected = read_by_python(data)
    if rows is not None:
        assert expected == rows, "the oracle must read what was written"
    if result.exit_code:
        assert rows is None
        assert path.name in document["error"]["message"]
        return
    assert expected is not None
    assert document["rows"] == len(expected) == sum(c["poses"] for c in document["compounds"])
    found = {c["compound"]: (c["prediction"], c["poses"]) for c in document["compounds"]}
    assert list(found) == list(means(expected))
    for name, (mean, n) in means(expected).items():
        # Sums of at most 24 numbers below 1e6, in another order.
        assert found[name] == (pytest.approx(mean, rel=1e-12, abs=1e-8), n)
    with weights.open(newline="", encoding="utf-8") as file:
        assert len([record for record in csv.reader(file) if record]) == 1 + len(expected)


FUZZ = settings(
    deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@settings(FUZZ, max_examples=50)
@given(table=tables())
def test_a_fuzzed_table_is_right_or_a_clear_error(tmp_path, table):
    check_fuzzed_table(tmp_path / "fuzzed.csv", *table)


@pytest.mark.slow("1,000 tables")
@settings(FUZZ, max_examples=1000)
@given(table=tables())
def test_each_of_a_thousand_fuzzed_tables_is_right_or_a_clear_error(tmp_path, table):
    check_fuzzed_table(tmp_path / "fuzzed.csv", *table)


@st.composite
def sdf_files(draw):
    tags = "".join(f"> <{tag}>\n{{}}\n\n" for tag in draw(st.permutations(["score", "other"])))
    molecule = "{}\n\n\n  0  0\nM  END\n" + tags + "$$$$\n"
    values = st.tuples(PLAIN, NUMBERS.map(repr), NUMBERS.map(repr))
    molecules = draw(st.lists(values, min_size=1, max_size=5))
    data = "".join(molecule.format(*own) for own in molecules).encode()
    mutations = ["end of the file missing", "byte", "newline", "return", "nan", "twice", "windows"]
    for mutation in draw(st.lists(st.sampled_from(mutations), max_size=2)):
        data = MUTATIONS[mutation](data, draw(st.integers(0, len(data))))
    return data


@settings(FUZZ, max_examples=50)
@given(data=sdf_files())
def test_a_fuzzed_sdf_file_is_right_or_a_clear_error(tmp_path, data):
    path, weights = tmp_path / "fuzzed.sdf", tmp_path / "weights.sdf"
    path.write_bytes(data)
    options = "--json", "--weights", str(weights), "--force"
    result = combine(str(path), "the-mean", *options, by="_Name")
    document = json.loads(result.stdout)
    if result.exit_code:
        assert path.name in document["error"]["message"]
        return
    lines = io.StringIO(data.decode("utf-8-sig"), newline=None).read().splitlines()
    parts = "\n".join(lines).split("$$$$")
    n_molecules = sum(bool(part.strip()) for part in parts)
    assert document["rows"] == n_molecules == sum(c["poses"] for c in document["compounds"])
    assert weights.read_text(encoding="utf-8").count(">  <weight>\n") == n_molecules


@settings(FUZZ, max_examples=50)
@given(table=tables())
def test_the_fast_reader_agrees_with_the_careful_one(tmp_path, table):
    path = tmp_path / "fuzzed.csv"
    path.write_bytes(table[0])
    wanted = rows.Wanted("compound", ("score",))
    reader = delimited.DelimitedTable(path)
    try:
        careful = rows.checked_rows(path, reader._records(wanted), wanted)
        plain = reader._is_plain()
    except Exception:
        return
    fast = reader._fast_rows(wanted) if plain else None
    if fast is not None:
        assert fast.names.to_list() == careful.names.to_list()
        assert fast.numbers["score"].to_list() == careful.numbers["score"].to_list()
        assert [fast.place(i) for i in range(len(fast.names))] == careful.places.to_list()
