"""Write files to try train.py with: conformers of FreeSolv's molecules, and their measured ΔG.

    python make_data.py FOLDER

The folder gets poses.sdf and measured.csv for four molecules of five, and new.sdf for the others.
new_measured.csv has what train.py must not see: the measured ΔG of the others.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rdkit import Chem

sys.path.append(str(Path(__file__).parents[1] / "freesolv"))
from conformers import Measurement, TableNotFoundError, embed, read_measurements

N_CONFORMERS = 5
FILES = "poses.sdf", "measured.csv", "new.sdf", "new_measured.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and return the exit status. Files that exist stay as they are."""
    parser = argparse.ArgumentParser(description="Write files to try train.py with.")
    parser.add_argument("folder", type=Path, help="folder of the files, made if it does not exist")
    parser.add_argument("--molecules", type=int, metavar="N", help="take only N molecules")
    options = parser.parse_args(argv)
    paths = [options.folder / name for name in FILES]
    for path in paths:
        if path.exists():
            # They may be the reader's own.
            print(f"{path} exists: nothing is written")
            return 0
    try:
        measurements = read_measurements()
    except TableNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    random.Random(0).shuffle(measurements)
    measurements = measurements[: options.molecules]
    options.folder.mkdir(parents=True, exist_ok=True)
    n_measured = len(measurements) * 4 // 5
    for part, sdf, table in (
        (measurements[:n_measured], *paths[:2]),
        (measurements[n_measured:], *paths[2:]),
    ):
        print(f"{sdf}: {write_poses(sdf, part)} conformers of {len(part)} molecules")
        write_table(table, part)
    return 0


def write_poses(path: Path, measurements: Iterable[Measurement]) -> int:
    """Write one record for each conformer, titled with the name; return how many."""
    n_poses = 0
    with Chem.SDWriter(str(path)) as writer:
        for measurement in measurements:
            mol = embed(measurement.smiles, N_CONFORMERS, threads=1)
            mol.SetProp("_Name", measurement.name)
            for conformer in mol.GetConformers():
                writer.write(mol, confId=conformer.GetId())
                n_poses += 1
    return n_poses


def write_table(path: Path, measurements: Iterable[Measurement]) -> None:
    """Write the name and the measured ΔG of each molecule, in kcal/mol."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "dG"])
        rows.writerows((m.name, m.measured) for m in measurements)


if __name__ == "__main__":
    sys.exit(main())
