"""Bags of scikit-learn's handwritten digits, and a convolutional network for one image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from bags import Bag
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from mtenn_core import Combination, MultiPoseModel

PLAIN = "plain autograd"
N_FEATURES = 64
CHUNK_SIZE = 8  # images that run at the same time
POSITIVE = 9  # a bag with this digit is positive
LEARNING_RATE = 1e-3


def draw_bags(n_bags: int, size: int, *, part: slice, seed: int) -> list[Bag]:
    """Return bags of images. One bag in two has at least one nine.

    Parameters
    ----------
    part : the images to draw from
    size : the number of images of a bag, shape (size, 1, 8, 8), between 0 and 1
    """
    digits = load_digits()
    images = torch.tensor(digits.images[part], dtype=torch.float32)[:, None] / 16
    is_nine = torch.tensor(digits.target[part] == POSITIVE)
    random = torch.Generator().manual_seed(seed)
    others, nines = (where.nonzero().flatten() for where in (~is_nine, is_nine))
    found = []
    for index in range(n_bags):
        chosen = others[torch.randint(len(others), (size,), generator=random)]
        label = index % 2
        if label:
            place = torch.randint(size, (1,), generator=random)
            chosen[place] = nines[torch.randint(len(nines), (1,), generator=random)]
        found.append(Bag(images[chosen], label))
    return found


class DigitNetwork(torch.nn.Module):
    """A network that maps images, shape (n, 1, 8, 8), to features, shape (n, 64).

    Parameters
    ----------
    enlarge : the factor by which the images are enlarged, so that a graph needs memory
    """

    def __init__(self, enlarge: int = 1) -> None:
        super().__init__()
        self.enlarge = enlarge
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(32, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(32, 64, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * 64, N_FEATURES),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.25),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of each image, shape (n, 64)."""
        if self.enlarge > 1:
            images = interpolate(images, scale_factor=self.enlarge)
        return self.layers(images)


def new_model(network: DigitNetwork, combination: Combination, gradients: str) -> MultiPoseModel:
    """Return a model of bags that runs ``CHUNK_SIZE`` images at a time."""
    options = {"collate": torch.stack, "chunk_size": CHUNK_SIZE}
    return MultiPoseModel(network, combination, gradients=gradients, **options)


def logit(network: DigitNetwork, combination: Combination, images: Tensor, way: str) -> Tensor:
    """Return the logit of one bag, shape (); a ``way`` is ``PLAIN`` or a mode."""
    if way == PLAIN:
        # In the chunks of the modes, so that dropout draws the same random numbers.
        return combination.combine(torch.cat([network(part) for part in images.split(CHUNK_SIZE)]))
    return new_model(network, combination, way)(list(images)).prediction


def loss_gradients(
    network: DigitNetwork, combination: Combination, bag: Bag, way: str
) -> tuple[Tensor, list[Tensor]]:
    """Return the cross-entropy of one bag, and its gradient for each parameter of both modules."""
    found = logit(network, combination, bag.conformers, way)
    loss = binary_cross_entropy_with_logits(found, found.new_tensor(float(bag.label)))
    parameters = [*network.parameters(), *combination.parameters()]
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


def train(model: MultiPoseModel, bags: Sequence[Bag], *, epochs: int) -> Iterator[float]:
    """Train, one bag a step, and yield the mean cross-entropy of each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    for _ in range(epochs):
        losses = []
        for index in torch.randperm(len(bags)):
            bag = bags[index]
            found = model(list(bag.conformers)).prediction
            loss = binary_cross_entropy_with_logits(found, found.new_tensor(float(bag.label)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        yield sum(losses) / len(losses)
