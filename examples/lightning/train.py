"""Train a multi-pose model with Lightning's Trainer, stop, and resume from the checkpoint.

    python train.py --help

README.md shows what it prints.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from docking import (
    Compound,
    CompoundBatch,
    PocketModel,
    collate_compounds,
    collate_poses,
    make_compounds,
)
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, Sampler

from mtenn_core import MultiPoseModel, registry
from mtenn_core.errors import CheckpointError, MtennError

KT = 0.593  # kcal/mol at 298 K
COMBINATIONS: dict[str, dict[str, Any]] = {
    "min": {"pred_scale": 1 / KT},
    "boltzmann": {"kT": KT},
    "mean": {},
}
CHUNK_SIZE = 16  # poses whose graphs are in memory together
BATCH_SIZE = 4  # compounds
TEST_FRACTION = 0.2
POSE_LOSS = 1.0  # weight of the loss on poses
# Of Lightning: the first is its own affair, the others say what is meant to be so.
WARNINGS = (
    r".isinstance\(treespec",
    "Checkpoint directory .* not empty",
    ".*not have many workers",
)


class DockingModel(lightning.LightningModule):
    """A multi-pose model with its loss and its optimizer.

    Parameters
    ----------
    combination : a name in ``COMBINATIONS``
    learning_rate : learning rate of the first epoch

    Attributes
    ----------
    losses : mean training loss of each epoch so far
    """

    def __init__(self, combination: str, learning_rate: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = MultiPoseModel(
            PocketModel(),
            registry.create(combination, **COMBINATIONS[combination]),
            gradients="recomputed",
            collate=collate_poses,
            chunk_size=CHUNK_SIZE,
        )
        self.losses: list[float] = []

    def training_step(self, batch: CompoundBatch, index: int) -> Tensor:
        """Return the loss on ΔG, plus a loss that lowers the crystal's pose below the others."""
        out = self.model(batch.poses, sizes=batch.sizes)
        of_poses = [
            cross_entropy(-predictions / KT, torch.tensor(crystal, device=self.device))
            for predictions, crystal in zip(
                out.pose_predictions.split(batch.sizes), batch.crystal, strict=True
            )
        ]
        loss = mse_loss(out.prediction, batch.delta_g) + POSE_LOSS * torch.stack(of_poses).mean()
        # Said, since Lightning cannot tell compounds from poses.
        size = len(batch.sizes)
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def on_train_epoch_end(self) -> None:
        """Keep the loss of the epoch, also in checkpoints."""
        self.losses.append(self.trainer.callback_metrics["loss"].item())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the losses."""
        checkpoint["losses"] = self.losses

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the losses."""
        self.losses = checkpoint["losses"]

    def configure_optimizers(self) -> dict[str, Any]:
        """Return Adam, and a schedule that does not depend on the number of epochs."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class ShuffledByEpoch(Sampler[int]):
    """A random order that depends only on seed and epoch, so a resumed run has the same order.

    ``shuffle=True`` draws from the global random state, which Lightning's checkpoints do not
    contain.
    """

    def __init__(self, n_compounds: int, seed: int) -> None:
        self.n_compounds, self.seed, self.epoch = n_compounds, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the order; the Trainer calls this method."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter(torch.randperm(self.n_compounds, generator=random).tolist())

    def __len__(self) -> int:
        return self.n_compounds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    start = time.perf_counter()
    try:
        figures = run(options)
    except (MtennError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    figures["seconds"] = time.perf_counter() - start
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"{figures['seconds']:.0f} s, imports not counted.")
    return 0 if figures["same"] else 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do everything in order, print it, and return the figures."""
    compounds = make_compounds(options.compounds, seed=options.seed)
    n_test = round(TEST_FRACTION * len(compounds))
    train, test = compounds[n_test:], compounds[:n_test]
    n_poses = sum(len(compound.poses) for compound in compounds)
    print(f"{len(train)} compounds to train on, {len(test)} to test on, {n_poses} poses. Made up.")

    stopped = fit(train, options, "stopped", epochs=options.stop_after)
    checkpoint = options.output / "stopped.ckpt"
    resumed = fit(train, options, "resumed", epochs=options.epochs, resume=checkpoint)
    at_once = fit(train, options, "at-once", epochs=options.epochs)

    show_losses(stopped=stopped, resumed=resumed, at_once=at_once)
    figures = {
        "losses": {"resumed": resumed.losses, "at once": at_once.losses},
        "same": same_parameters(resumed, at_once) and resumed.losses == at_once.losses,
        "test": show_accuracy(resumed, train, test),
        "refused": refusal(checkpoint, options.combination),
    }
    verdict = "the same, to the last digit" if figures["same"] else "NOT the same"
    print(f"Resumed and at once: {verdict}.\n")
    print(f"{checkpoint} in a model with another combination:\n  {figures['refused']}\n")
    return figures


def fit(
    train: Sequence[Compound],
    options: argparse.Namespace,
    name: str,
    *,
    epochs: int,
    resume: Path | None = None,
) -> DockingModel:
    """Return a model trained up to an epoch, from the beginning or from a checkpoint."""
    lightning.seed_everything(options.seed, verbose=False)
    module = DockingModel(options.combination)
    loader = DataLoader(
        train,
        batch_size=BATCH_SIZE,
        sampler=ShuffledByEpoch(len(train), options.seed),
        collate_fn=collate_compounds,
    )
    trainer = new_trainer(options, name, epochs, n_batches=len(loader))
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return module


def new_trainer(
    options: argparse.Namespace, name: str, epochs: int, *, n_batches: int
) -> lightning.Trainer:
    """Return a Trainer that writes ``<name>.ckpt`` after each epoch."""
    keep_last = ModelCheckpoint(options.output, name, enable_version_counter=False)
    show = sys.stdout.isatty()
    return lightning.Trainer(
        accelerator=options.accelerator,
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=options.accumulate,
        callbacks=[keep_last, *[RichProgressBar()] * show],
        log_every_n_steps=min(50, n_batches),
        logger=False,
        enable_progress_bar=show,
        enable_model_summary=False,
    )


def show_losses(**modules: DockingModel) -> None:
    """Print the loss of each epoch."""
    print("\nloss by epoch")
    for name, module in modules.items():
        losses = "".join(f"{loss:9.3f}" for loss in module.losses)
        print(f"  {name.replace('_', ' '):<8}{losses}")


def same_parameters(one: DockingModel, other: DockingModel) -> bool:
    """Return whether two models are equal, bit for bit."""
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])


@torch.no_grad()
def show_accuracy(
    module: DockingModel, train: Sequence[Compound], test: Sequence[Compound]
) -> dict[str, float]:
    """Print and return the errors for compounds that the model was not trained on."""
    batch = collate_compounds(test)
    out = module.model(batch.poses, sizes=batch.sizes)
    best = [int(part.argmin()) for part in out.pose_predictions.split(batch.sizes)]
    mean = collate_compounds(train).delta_g.mean()
    figures = {
        "rmse": mse_loss(out.prediction, batch.delta_g).sqrt().item(),
        "rmse of the mean": (mean - batch.delta_g).square().mean().sqrt().item(),
        "crystal pose first": sum(map(int.__eq__, best, batch.crystal)) / len(test),
    }
    print(
        f"test: RMSE {figures['rmse']:.2f} kcal/mol (predict the mean:"
        f" {figures['rmse of the mean']:.2f}); the crystal's pose is the lowest of"
        f" {100 * figures['crystal pose first']:.0f} % of the compounds"
    )
    return figures


def refusal(checkpoint: Path, combination: str) -> str:
    """Load a checkpoint with another combination and return the error message."""
    other = next(name for name in COMBINATIONS if name != combination)
    try:
        DockingModel.load_from_checkpoint(checkpoint, combination=other, weights_only=True)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("a checkpoint of another combination was loaded")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--combination", choices=COMBINATIONS, default="min")
    add("--compounds", type=int, default=240, help="how many to make up (default: %(default)s)")
    add("--epochs", type=int, default=4, help="in all (default: %(default)s)")
    add("--stop-after", type=int, default=2, help="epochs, then resume (default: %(default)s)")
    add("--accumulate", type=int, default=2, help="batches in a step (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    add("--accelerator", default="cpu", help="Lightning's name of it (default: %(default)s)")
    add("--output", type=Path, default=Path("lightning_example"), help="folder of checkpoints")
    add("--json", type=Path, metavar="FILE", help="write the figures here, too")
    options = parser.parse_args(argv)
    if not 0 < options.stop_after < options.epochs:
        parser.error("--stop-after must be at least 1 and less than --epochs")
    if options.compounds < 2 * BATCH_SIZE:
        parser.error(f"--compounds must be at least {2 * BATCH_SIZE}")
    return options


if __name__ == "__main__":
    sys.exit(main())
