"""Describe the multi-pose models in a checkpoint file, as JSON data and as text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mtenn_core._cli.output import error_to_json
from mtenn_core._process.printable import error_message, error_text, value_text
from mtenn_core._registry import registry
from mtenn_core.errors import CheckpointError, MtennError

if TYPE_CHECKING:
    from mtenn_core._engine.checkpoint_file import SavedModel

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_MAX_VALUES = 8


def is_checkpoint(name: str) -> bool:
    """Return True if an argument of ``mtenn info`` is a file, and not the name of a combination."""
    if name in registry:
        return False
    is_path = os.sep in name or name.lower().endswith(_SUFFIXES)
    return is_path or os.path.isfile(name)


def checkpoint_facts(path: str, *, imports: bool) -> dict[str, Any]:
    """Return the facts about a checkpoint file as JSON data.

    Parameters
    ----------
    imports : True to make the combinations, which imports and validates their plugins

    Raises
    ------
    CheckpointError : the file cannot be read, or has no combination
    """
    from mtenn_core._engine.checkpoint_file import read_file, saved_models

    try:
        kind, content = read_file(path)
    except OSError as error:
        raise CheckpointError(f"{path!r} cannot be read: {error_message(error)}") from error
    models = saved_models(content)
    return {
        "file": path,
        "format": kind,
        "models": [_model(model, content, imports=imports) for model in models],
    }


def _model(model: SavedModel, content: Mapping[str, Any], *, imports: bool) -> dict[str, Any]:
    names = model.identities[0].get("tasks")
    made, error = _made(model, content) if imports else (None, None)
    numbers = {
        part: _n_numbers(model.part(f"{part}.")) for part in ("pose_model", "shared", "combination")
    }
    combinations = [
        _combination(identity, state) | {"now": made and made[i]}
        for i, (identity, state) in enumerate(zip(model.identities, model.states(), strict=True))
    ]
    status = "not imported"
    if imports:
        status = "passes" if made else "fails"
    return {
        "path": model.path,
        "combinations": combinations,
        "tasks": names,
        "n_tasks": len(names or combinations) if names or model.several else None,
        "numbers": numbers,
        "status": status,
        "error": error,
    }


def _made(
    model: SavedModel, content: Mapping[str, Any]
) -> tuple[list[str] | None, dict[str, str] | None]:
    """Make the combinations again. Return the ``repr`` of each, or the error."""
    try:
        made = registry.from_checkpoint(content, model=model.path)
    except MtennError as error:
        return None, error_to_json(error)
    except Exception as error:  # a plugin's code may raise anything
        return None, {"type": type(error).__name__, "message": error_text(error)}
    return [value_text(each) for each in (made if isinstance(made, list) else [made])], None


def _combination(identity: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": identity["name"],
        "distribution": identity["distribution"],
        "version": identity["version"],
        "class": identity["class"],
        "arguments": [
            {"name": name} | _value(identity, name, state) for name in identity["arguments"]
        ],
        "tensors": [
            {"name": name, "shape": list(tensor.shape), "values": _values(tensor)}
            for name, tensor in state.items()
            if hasattr(tensor, "shape")
        ],
    }


def _value(identity: Mapping[str, Any], name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an argument as Python writes it; or its description, if there is no exact value."""
    from mtenn_core._registry.checkpoints import argument_value, is_exact

    if is_exact(identity, name):
        try:
            return {"value": value_text(argument_value(identity, name, state)), "exact": True}
        except ValueError:  # for example, numpy is not installed
            pass
    described = identity["arguments"][name]
    text = described if isinstance(described, str) else json.dumps(described)
    return {"value": text, "exact": False}


def _values(tensor: Any) -> list[float | None] | None:
    """Return the numbers of a small tensor in a flat list; None for one that is not finite."""
    import torch

    is_plain = tensor.layout is torch.strided and not tensor.is_complex()
    if tensor.numel() > _MAX_VALUES or not is_plain:
        return None
    numbers = tensor.detach().double().flatten().tolist()
    return [number if abs(number) < float("inf") else None for number in numbers]


def _n_numbers(state: Mapping[str, Any]) -> int:
    return sum(tensor.numel() for tensor in state.values() if hasattr(tensor, "numel"))


def checkpoint_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that show these facts."""
    yield f"{'file':<14}{facts['file']} ({facts['format']})"
    for model in facts["models"]:
        if len(facts["models"]) > 1 or model["path"]:
            yield f"{'model':<14}{model['path']}"
        for combination in model["combinations"]:
            yield from _combination_lines(combination)
        for name, text in _model_texts(model):
            yield f"{name:<14}{text}"


def _model_texts(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if model["tasks"]:
        yield "tasks", ", ".join(map(str, model["tasks"]))
    elif model["n_tasks"]:
        yield "tasks", f"{model['n_tasks']} without names"
    yield "pose model", f"{model['numbers']['pose_model']:,} numbers in parameters and buffers"
    if model["numbers"]["shared"]:
        yield "shared part", f"{model['numbers']['shared']:,} numbers in parameters and buffers"
    if model["status"] == "passes":
        yield "installed", "yes, and it passes the gate"
    elif model["error"]:
        yield "problem", model["error"]["message"]


def _combination_lines(combination: Mapping[str, Any]) -> Iterator[str]:
    origin = combination["class"]
    if combination["distribution"]:
        origin = f"{combination['distribution']} {combination['version']}, {origin}"
    yield f"{'combination':<14}{combination['name'] or 'no plugin'} ({origin})"
    for argument in combination["arguments"]:
        note = "" if argument["exact"] else " (only described)"
        yield f"{'argument':<14}{argument['name']} = {argument['value']}{note}"
    for tensor in combination["tensors"]:
        values = tensor["values"]
        text = f"shape {tuple(tensor['shape'])}"
        if values is not None:
            text = ", ".join("not finite" if v is None else f"{v:.6g}" for v in values)
        yield f"{'tensor':<14}{tensor['name']} = {text}"
    if combination["now"]:
        yield f"{'now':<14}{combination['now']}"
