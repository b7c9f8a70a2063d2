"""Find multi-pose models in a checkpoint: a file of torch, Lightning or safetensors, or a dict."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.checkpoint import read_identities
from mtenn_core._process.torch_modes import has_numbers, without_modes
from mtenn_core.errors import CheckpointError

Format = Literal["torch", "safetensors"]
_KEY = "_extra_state"
# Lightning and training loops put state dicts into dicts. Dicts inside of deeper ones are data.
_MAX_DEPTH = 4
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


class SavedModel(NamedTuple):
    """A multi-pose model in a checkpoint.

    Attributes
    ----------
    path : where it is: the keys of dicts and the prefix of its names, with dots between them
    identities : what :func:`mtenn_core._engine.checkpoint.identity` returned for each combination
    state : its state dict, without the prefix
    several : True if it has a list of combinations, one for each task
    """

    path: str
    identities: Sequence[dict[str, Any]]
    state: Mapping[str, Any]
    several: bool

    def states(self) -> list[dict[str, Any]]:
        """Return the state dict of each combination."""
        if not self.several:
            return [self.part("combination.")]
        return [self.part(f"combination.{i}.") for i in range(len(self.identities))]

    def part(self, prefix: str) -> dict[str, Any]:
        """Return the entries with this prefix, without it."""
        return {
            key.removeprefix(prefix): value
            for key, value in self.state.items()
            if key.startswith(prefix)
        }


def read_file(path: str | os.PathLike[str]) -> tuple[Format, Mapping[str, Any]]:
    """Return the format and the content of a checkpoint file. No code of the file runs.

    Tensors of a large file are read when they are used.

    Raises
    ------
    OSError : the file cannot be read
    CheckpointError : it is no checkpoint, or it has objects that ``weights_only=True`` refuses
    """
    with without_modes(process_wide=False):
        if _is_safetensors(path):
            return "safetensors", _read_safetensors(path)
        return "torch", _read_torch(path)


def saved_model(content: Mapping[str, Any], path: str | None = None) -> SavedModel:
    """Return the multi-pose model in the content of a checkpoint.

    Parameters
    ----------
    path : the one to return, if there are several

    Raises
    ------
    CheckpointError : there is none, or there are several, or its identity cannot be read
    """
    if not isinstance(content, Mapping):
        raise TypeError(
            "a checkpoint must be a path, a state dict, or a dict with one; found a"
            f" {type(content).__name__}"
        )
    found = saved_models(content)
    paths = ", ".join(repr(model.path) for model in found)
    if path is not None:
        found = [model for model in found if model.path == path]
        if not found:
            raise CheckpointError(f"the checkpoint has no model {path!r}; found {paths}")
    if len(found) > 1:
        raise CheckpointError(
            f"the checkpoint has several multi-pose models: {paths}. Name one of them, for example"
            f" model={found[0].path!r}"
        )
    return found[0]


def saved_models(content: Mapping[str, Any]) -> list[SavedModel]:
    """Return all multi-pose models in the content of a checkpoint; there is at least one.

    Raises
    ------
    CheckpointError : there is none, or the identity of the only one cannot be read
    """
    found, errors = [], []
    for keys, state in _state_dicts(content, ()):
        for key in state:
            if _is_identity(key):
                try:
                    found.append(_model(keys, state, key))
                except CheckpointError as error:  # other modules may have such an entry, too
                    errors.append(error)
    if errors and not found:
        raise errors[0]
    if not found:
        raise CheckpointError(
            "the checkpoint says nothing of a combination: it has no key that ends in"
            f" {_KEY!r}, which the state dict of a MultiPoseModel has. Make the combination"
            " yourself, and load the state dict with strict=False"
        )
    return found


def _model(keys: tuple[str, ...], state: Mapping[str, Any], key: str) -> SavedModel:
    prefix = key.removesuffix(_KEY)
    if isinstance(state[key], Tensor) and not has_numbers(state[key]):
        raise CheckpointError("the tensors of the checkpoint have no numbers (device meta)")
    identities = read_identities(state[key])
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    # One combination in a list is written as if it were in none. Only its parameters tell.
    names = [k for k in own if k.startswith("combination.")]
    in_list = bool(names) and all(k.startswith("combination.0.") for k in names)
    several = len(identities) > 1 or in_list
    path = ".".join([*keys, prefix.removesuffix(".")]).strip(".")
    return SavedModel(path, identities, own, several)


def _state_dicts(
    content: Mapping[Any, Any], keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield each dict that has the identity of a combination, and the keys that lead to it."""
    if any(map(_is_identity, content)):
        yield keys, {key: value for key, value in content.items() if isinstance(key, str)}
    if len(keys) < _MAX_DEPTH:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from _state_dicts(value, (*keys, str(key)))


def _is_identity(key: object) -> bool:
    return isinstance(key, str) and (key == _KEY or key.endswith(f".{_KEY}"))


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Return True if a file begins as safetensors do: 8 bytes for a length, then JSON."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path)


def _read_safetensors(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{os.fspath(path)!r} is a file of safetensors. To read it, run: pip install"
            " safetensors"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{os.fspath(path)!r} cannot be read: {error}") from error


def _read_torch(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    name = os.fspath(path)
    mmap = zipfile.is_zipfile(path)  # what torch wrote before 1.6 is read as a whole
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:
        refused = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise CheckpointError(
                f"{name!r} contains {refused[1]}, and torch.load(weights_only=True) reads only"
                " tensors, numbers, text and containers of them. If you trust the file, read it"
                " yourself: registry.from_checkpoint(torch.load(path, weights_only=False))"
            ) from error
        raise CheckpointError(
            f"{name!r} is no checkpoint: neither torch.save nor safetensors has written it, or it"
            " is damaged"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{name!r} must contain a state dict, or a dict with one; found a"
            f" {type(content).__name__}. Save model.state_dict()"
        )
    return content
