"""Private interfaces of torch: one module touches them, and replaces each that is missing."""

import ast
import builtins
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch.autograd import forward_ad

import mtenn_core
from mtenn_core import Combination, MultiPoseModel, _torch_internals
from mtenn_core._process.torch_modes import without_modes
from mtenn_core.errors import TorchVersionError

# Later parts of the model are imported when they are used, and hide_in_engine must find them.
from mtenn_core.testing import check_combination
from mtenn_core.testing._probe.operations import OperationCount

ROOT = Path(mtenn_core.__file__).parent
PLUGINS = Path(__file__).parents[1] / "plugins"
IN_2_6 = Version(torch.__version__).release[:2] == (2, 6)

# --- No other module touches a private interface ---

# Functions that get the name of an attribute as text.
BY_NAME = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller"}


def names_in(interfaces):
    """Return the private names on the paths to some interfaces."""
    return {n for path in interfaces for n in path.split(".") if is_private(n)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def chain(node: ast.AST) -> list[str]:
    """Return the names in `a.b.c`; empty if it does not start with a name."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [*names, node.id][::-1] if isinstance(node, ast.Name) else []


# Some classes of the core have an attribute of the same name for themselves.
KNOWN = names_in(_torch_internals.INTERFACES)


# Also as a text, which vars(module) takes.
IN_MODULES = set(filter(is_private, vars(torch.nn.Module())))


def private_uses(source: str) -> list[str]:
    """Return the lines of a module that touch a private interface of torch."""
    tree = ast.parse(source)
    found = []
    from_torch = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            paths = [f"{module}.{n.name}" if module else n.name for n in node.names]
            for alias, path in zip(node.names, paths, strict=True):
                if path.split(".")[0] == "torch":
                    from_torch.add(alias.asname or alias.name.split(".")[0])
                    if any(map(is_private, path.split("."))):
                        found.append((node.lineno, path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *names = chain(node) or [""]
            of_torch = first in from_torch and any(map(is_private, names))
            of_object = node.attr in KNOWN and first not in ("self", "cls")
            if of_torch or of_object:
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else name
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
            if name in BY_NAME and KNOWN & set(texts):
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Constant) and node.value in IN_MODULES:
            found.append((node.lineno, ast.unparse(node)))
    return sorted({f"{line}: {code}" for line, code in found})


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted(ROOT.rglob("*.py")) + sorted(PLUGINS.glob("*/mtenn_*/**/*.py"))
        if path.name != "_torch_internals.py"
    ],
    ids=lambda path: path.parent.name + "/" + path.name,
)
def test_a_module_touches_no_private_interface_of_torch(path):
    assert not private_uses(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._C._len_torch_function_stack()",
        "import torch as t\ndef f():\n    return t.autograd.graph._engine_run_backward",
        "from torch import nn\nnn.modules.module._global_forward_hooks",
        "from torch.utils._pytree import tree_map",
        "import torch._functorch.pyfunctorch",
        "def f(tensor):\n    return tensor._version",
        "def f(tensor):\n    return tensor.grad_fn._input_metadata[0]",
        "def f(node):\n    return node().next._sequence_nr()",
        "hooks = getattr(tensor, '_backward_hooks')",
        "import operator\nbase = operator.attrgetter('_base')",
        "children = vars(module)['_modules']",
    ],
)
def test_a_private_interface_is_found(code):
    assert private_uses(code)


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.autograd.graph.Node",
        "self._base",
        "import os\nos._exit(0)",
        "x.__dict__",
    ],
)
def test_a_public_interface_and_an_attribute_of_ones_own_are_not_found(code):
    assert not private_uses(code)


# --- This torch has them ---


@pytest.mark.parametrize("path", _torch_internals.INTERFACES)
def test_this_torch_has_the_interface(path):
    expected = not (IN_2_6 and path in _torch_internals.NOT_IN_2_6)
    assert _torch_internals.INTERFACES[path] is expected


# --- One that is missing ---


def without(*paths: str):
    """Import the module of private interfaces in a torch that lacks some of them."""
    hidden = {path.rpartition(".")[2] for path in paths}
    assert set(paths) <= set(_torch_internals.INTERFACES)
    spec = importlib.util.spec_from_file_location("internals", _torch_internals.__file__)
    module = importlib.util.module_from_spec(spec)

    def getattr_hiding(where, name, *default):
        return default[0] if name in hidden else builtins.getattr(where, name, *default)

    module.getattr = getattr_hiding  # in a module, it comes before the builtin
    spec.loader.exec_module(module)
    del module.getattr
    assert not any(module.INTERFACES[path] for path in paths)
    return module


@pytest.fixture
def hide(monkeypatch):
    """Make all modules of the core run as in a torch that lacks some interfaces."""

    def hide(*paths):
        other = without(*paths)
        # Only what depends on these interfaces: another class would not be the same class.
        changed = {
            name: getattr(other, name)
            for name, value in vars(_torch_internals).items()
            if callable(value) and not isinstance(value, type) and not name.startswith("_")
        }
        changed |= {"ENGINE_CODE": other.ENGINE_CODE, "_VMAP": other._VMAP}
        modules = [m for n, m in sys.modules.items() if n.startswith("mtenn_core")]
        for name, value in changed.items():
            before = getattr(_torch_internals, name)
            for module in modules:
                if module.__dict__.get(name, module) is before:
                    monkeypatch.setattr(module, name, value)
        return other

    return hide


@pytest.mark.parametrize("path", _torch_internals.INTERFACES)
def test_an_import_needs_no_private_interface(path):
    without(path)


class SmoothMinimum(Combination):
    def combine(self, predictions):
        return -torch.logsumexp(-predictions, dim=0)


class FirstPoses(Combination):
    """The poses after the second one have no weight."""

    def combine(self, predictions):
        return predictions[:2].mean()

    def pose_weights(self, predictions):
        weights = torch.zeros_like(predictions)
        weights[:2] = 0.5
        return weights


def gradients(pose_model, poses, combination, mode, **options):
    model = MultiPoseModel(pose_model, combination, gradients=mode)
    results = []
    for _ in range(2):
        prediction = model(poses, **options).prediction
        found = torch.autograd.grad(prediction.sum(), list(pose_model.parameters()))
        results += [prediction, *found]
    return results


# With the modes that use the interface, and that give the same numbers without it.
PUBLIC_WAYS = {
    "_C._current_graph_task_id": ["recomputed", "stored"],
    "_C._autograd._get_current_graph_task_keep_graph": ["stored"],
    "autograd.graph._engine_run_backward": ["recomputed"],
    "Tensor._base": ["graph", "stored", "recomputed"],
    "Node._input_metadata": ["stored"],
    "_C._functorch.peek_interpreter_stack": ["graph", "stored", "recomputed"],
    "_C._functorch.is_batchedtensor": ["graph", "stored", "recomputed"],
    "_C._functorch.is_legacy_batchedtensor": ["stored", "recomputed"],
    "autograd.forward_ad._current_level": ["stored"],
}


@pytest.mark.parametrize("combination", [SmoothMinimum, FirstPoses])
@pytest.mark.parametrize(("path", "modes"), PUBLIC_WAYS.items(), ids=list(PUBLIC_WAYS))
def test_the_public_way_gives_the_same_numbers(path, modes, combination, pose_model, poses, hide):
    options = {"sizes": [3, 4]}
    expected = {m: gradients(pose_model, poses, combination(), m, **options) for m in modes}
    hide(path)
    for mode in modes:
        found = gradients(pose_model, poses, combination(), mode, **options)
        for a, b in zip(found, expected[mode], strict=True):
            assert torch.equal(a, b)


VMAP = [
    f"_C._functorch.{name}"
    for name in (
        "_vmap_increment_nesting",
        "_add_batch_dim",
        "_remove_batch_dim",
        "_vmap_decrement_nesting",
    )
]


@pytest.mark.parametrize("path", VMAP)
def test_compounds_of_one_size_give_the_same_numbers_without_vmaps_own_functions(
    path, pose_model, hide, monkeypatch
):
    def results():
        model = MultiPoseModel(pose_model, SmoothMinimum())  # anew: it compares a batch first
        rows = torch.linspace(-1, 1, 96, dtype=torch.float64).view(24, 4)
        prediction = model(rows, sizes=[3] * 8).prediction
        return [prediction, *torch.autograd.grad(prediction.sum(), list(pose_model.parameters()))]

    expected = results()
    other = hide(path)
    calls = []
    vmap = torch.func.vmap
    monkeypatch.setattr(torch.func, "vmap", lambda f: calls.append(f) or vmap(f))
    found = results()
    assert other._VMAP == []
    assert calls
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_sum_without_foreach_is_the_same():
    tensors = [torch.randn(3), torch.randn(2, 2)]
    sums = [torch.ones_like(tensor) for tensor in tensors]
    expected = [total + 0.5 * tensor for total, tensor in zip(sums, tensors, strict=True)]
    without("_foreach_add_").add_in_place(sums, tensors, alpha=0.5)
    torch.testing.assert_close(sums, expected, rtol=0, atol=0)


@pytest.mark.parametrize("transform", ["none", "vmap", "grad", "jvp", "dual level"])
def test_a_transform_is_found_without_the_private_interfaces(transform):
    other = without(
        "_C._functorch.peek_interpreter_stack",
        "_C._functorch.is_batchedtensor",
        "_C._functorch.is_functorch_wrapped_tensor",
        "autograd.forward_ad._current_level",
    )
    seen = []

    def look(tensor):
        for each in (_torch_internals, other):
            seen.append(
                (
                    each.current_transform() is not None,
                    each.is_batched_by_vmap(tensor),
                    each.is_wrapped(tensor),
                    each.forward_ad_level() >= 0,
                )
            )
        return tensor.sum()

    rows = torch.ones(2, 3)
    if transform == "vmap":
        torch.func.vmap(look)(rows)
    elif transform == "grad":
        torch.func.grad(look)(rows)
    elif transform == "jvp":
        torch.func.jvp(look, (rows,), (rows,))
    elif transform == "dual level":
        with forward_ad.dual_level():
            look(rows)
    else:
        look(rows)
    with_interface, without_it = map(list, seen)
    if IN_2_6 and with_interface[2]:  # there, no tensor of a transform can be read
        with_interface[1] = without_it[1] = True
    assert without_it == with_interface


def test_a_batch_of_gradients_is_found_without_the_private_interfaces():
    other = without("_C._functorch.is_legacy_batchedtensor")
    seen = []
    tensor = torch.ones(3, requires_grad=True)
    doubled = tensor * 2
    doubled.register_hook(lambda g: seen.append(other.is_batched_by_vmap(g)))
    torch.autograd.grad(doubled, tensor, torch.eye(3), is_grads_batched=True)
    assert seen == [True]


def test_a_sparse_tensor_has_numbers_without_the_private_interface():
    sparse = torch.eye(2).to_sparse()  # it has no storage of its own, but belongs to no transform
    assert not without("_C._functorch.is_functorch_wrapped_tensor").is_wrapped(sparse)


def test_unknown_transforms_count_as_vmap():
    other = without("_C._functorch.peek_interpreter_stack")
    names = []
    torch.func.grad(lambda t: (names.append(other.current_transform().key().name), t)[1])(
        torch.ones(())
    )
    assert names == ["Vmap"]


def test_buffers_outside_of_the_state_dict_are_found_without_the_private_set():
    module = torch.nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    other = without("Module._non_persistent_buffers_set")
    assert other.non_persistent_of(module) == {"scratch"}


def test_einsum_options_are_set_without_the_private_functions(monkeypatch):
    other = without("backends.opt_einsum.m._get_strategy")
    before = torch.backends.opt_einsum.enabled
    assert other.einsum_enabled() is before
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", before)
    other.set_einsum_enabled(False)
    assert _torch_internals.einsum_enabled() is False


# Interfaces that nothing replaces: the name in the module, and a part of the error.
ERRORS = {
    "Tensor._version": ("version_of", "changes in place .*Use gradients='graph', or torch 2"),
    "Tensor._backward_hooks": ("hooks_of", "'stored'.*Use gradients='recomputed' or 'graph', or"),
    "Node._sequence_nr": ("sequence_number", "'recomputed'.*Use gradients='stored' or 'graph', or"),
    "multiprocessing.reductions.StorageWeakRef": ("weak_reference", "model.estimate .*Use torch 2"),
    "Node._input_metadata": ("input_metadata", "check A1 .*Use torch 2"),
    "Module._parameters": ("parameters_of", "mtenn-core .*Use torch 2"),
    "Module._buffers": ("buffers_of", "mtenn-core .*Use torch 2"),
    "Module._modules": ("children_of", "mtenn-core .*Use torch 2"),
    "_functorch.pyfunctorch.temporarily_clear_interpreter_stack": (
        "outside_transforms",
        "validation inside a transform.*Use registry.create outside of it, or",
    ),
    "utils._python_dispatch.TorchDispatchMode": ("DispatchMode", "mtenn check .*Use torch 2"),
    "ops.aten.add.Tensor._schema": ("schema_of", "mtenn check .*Use torch 2"),
}


@pytest.mark.parametrize("path", ERRORS)
def test_an_interface_that_nothing_replaces_is_a_plain_error(path):
    name, text = ERRORS[path]
    function = getattr(without(path), name)
    with pytest.raises(TorchVersionError, match=text) as caught:
        function()
    assert f"needs {path} of torch" in str(caught.value)
    assert f"torch {torch.__version__} does not have" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "mode", "works"),
    [
        ("Tensor._version", "stored", ["graph"]),
        ("Tensor._version", "recomputed", ["graph"]),
        ("Tensor._backward_hooks", "stored", ["recomputed", "graph"]),
        ("Node._sequence_nr", "recomputed", ["stored", "graph"]),
    ],
)
def test_a_mode_names_the_modes_that_work(path, mode, works, pose_model, poses, hide):
    combination = SmoothMinimum()
    expected = gradients(pose_model, poses, combination, "graph")
    hide(path)
    with pytest.raises(TorchVersionError, match="Use gradients="):
        gradients(pose_model, poses, combination, mode)
    for other in works:
        found = gradients(pose_model, poses, combination, other)
        torch.testing.assert_close(found, expected)  # modes differ by roundoff


@pytest.mark.parametrize(
    ("path", "check"),
    [("Tensor._backward_hooks", "A4"), ("ops.aten.add.Tensor._schema", "A13")],
)
def test_a_check_that_needs_an_interface_is_an_error_and_the_others_pass(path, check, hide):
    hide(path)
    report = check_combination(SmoothMinimum, only=["B1", check])
    records = {record.id: record for record in report.records}
    assert {id: record.status for id, record in records.items()} == {"B1": "pass", check: "error"}
    assert path in records[check].reason


# Interfaces for settings that are not watched without them: what the module then says.
NOT_WATCHED = {
    **dict.fromkeys(
        [
            "_C._len_torch_function_stack",
            "_C._get_function_stack_at",
            "_C._pop_torch_function_stack",
            "_C._push_on_torch_function_stack",
        ],
        lambda module: module.n_function_modes() == 0,
    ),
    **dict.fromkeys(
        [
            "_C._len_torch_dispatch_stack",
            "_C._get_dispatch_stack_at",
            "_C._pop_torch_dispatch_stack",
            "_C._push_on_torch_dispatch_stack",
        ],
        lambda module: module.n_dispatch_modes() == 0,
    ),
    **dict.fromkeys(
        [
            "_C._autograd._top_saved_tensors_default_hooks",
            "_C._autograd._pop_saved_tensors_default_hooks",
            "_C._autograd._push_saved_tensors_default_hooks",
        ],
        lambda module: module.top_saved_hooks(False) is None,
    ),
    **dict.fromkeys(
        [
            "_C._is_fwd_grad_enabled",
            "_C._set_fwd_grad_enabled",
            "_C._is_multithreading_enabled",
            "_C._set_multithreading_enabled",
        ],
        lambda module: module.forward_ad_enabled() is module.threads_enabled() is None,
    ),
    **dict.fromkeys(
        ["_C._get_fp32_precision_getter", "_C._set_fp32_precision_setter"],
        lambda module: module.get_precision is module.set_precision is None,
    ),
    "_GLOBAL_DEVICE_CONTEXT": (
        lambda module: module.default_device_mode is not torch._GLOBAL_DEVICE_CONTEXT
    ),
    "_tensor_str.PRINT_OPTS": lambda module: module.PRINT_OPTIONS == {},
    "_functorch.autograd_function.custom_function_call": (
        lambda module: module.custom_function_call is None
    ),
}


@pytest.mark.parametrize("path", NOT_WATCHED)
def test_a_setting_without_its_interface_is_not_watched(path):
    with (
        torch.device("meta"),
        torch.autograd.graph.save_on_cpu(),
        OperationCount(),
    ):
        # Some interfaces of torch 2.6 are of no use there, because another one is missing.
        assert IN_2_6 or not NOT_WATCHED[path](_torch_internals)
        module = without(path)
        assert NOT_WATCHED[path](module)


# In torch 2.6, the other tests of the gate run without those in NOT_IN_2_6.
@pytest.mark.parametrize(
    "path", [path for path in NOT_WATCHED if path not in _torch_internals.NOT_IN_2_6]
)
def test_the_gate_runs_without_the_interface_of_a_setting(path, hide):
    hide(path)
    with without_modes():
        assert torch.is_grad_enabled()


SWITCHES = {function: n for n, pair in _torch_internals._PAIRS.items() for function in pair}


@pytest.mark.parametrize("function", SWITCHES)
def test_a_switch_without_its_functions_is_left_out(function):
    found = without(f"_C.{function}").BACKEND_SWITCHES.keys()
    name = f"torch.backends.{SWITCHES[function]}"
    assert found == _torch_internals.BACKEND_SWITCHES.keys() - {name}


# They are read by name, where a missing one changes nothing.
BY_NAME_ONLY = {
    "compiler._is_compiling_flag",
    "compiler._is_exporting_flag",
    "nn.modules.module._global_forward_hooks",
    "nn.modules.module._global_backward_hooks",
}
OTHERS = {
    "_foreach_add_",  # test_a_sum_without_foreach_…
    "Module._non_persistent_buffers_set",  # test_buffers_outside_…
    *VMAP,
    "_C._functorch.is_functorch_wrapped_tensor",  # test_a_transform_is_found_without…
    *(f"backends.opt_einsum.m._{n}" for n in ("get_enabled", "get_strategy")),  # test_einsum_…
    *(f"backends.opt_einsum.m._{n}" for n in ("set_enabled", "set_strategy")),
}


def test_each_interface_has_a_test_without_it():
    tested = PUBLIC_WAYS.keys() | ERRORS.keys() | NOT_WATCHED.keys() | BY_NAME_ONLY | OTHERS
    assert tested | {f"_C.{name}" for name in SWITCHES} == _torch_internals.INTERFACES.keys()
