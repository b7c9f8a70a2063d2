"""Threads share a registry: nothing waits for ever, is imported twice, or is lost."""

import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from conftest import forget_modules_in
from installed import GOOD, write_distribution
from tiers import slow

import mtenn_core.testing
from mtenn_core import Combination, Registry
from mtenn_core._process import locks
from mtenn_core._process.settings import default_settings
from mtenn_core._registry import gate as gates
from mtenn_core._registry import load as loading
from mtenn_core._registry import lookup

N_THREADS, N_NAMES = 16, 50
SECONDS = 60.0
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
COUNTED = """
import time
from mtenn_core import Combination
import demo_counts

demo_counts.imported.append(__name__)
time.sleep(0.0005)  # so that others come meanwhile

class Good(Combination):
    def combine(self, predictions):
        return predictions.mean()
"""


class Mean(Combination):
    def combine(self, predictions):
        return predictions.mean()


@pytest.fixture
def counts(places):
    """Install 50 plugins that count their imports; return the module with the counts.

    Nothing else is on the path: to scan it again and again would take most of the time.
    """
    assert Registry().names()  # which has imported what it needs
    for entry in list(sys.path):
        if list(Path(entry).glob("*.dist-info")) and entry != str(places.site):
            sys.path.remove(entry)
    (places.site / "demo_counts.py").write_text("imported = []\n")
    for i in range(N_NAMES):
        write_distribution(places.site, f"demo-{i}", {f"rule-{i}": f"demo_{i}:Good"}, COUNTED)
    return __import__("demo_counts")


@pytest.fixture(autouse=True)
def _short_slices():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("n_runs", [20, *slow(200, reason="ten times as long")])
def test_no_name_is_lost_or_imported_twice_while_the_registry_changes(counts, places, n_runs):
    names = {f"rule-{i}" for i in range(N_NAMES)}
    with ThreadPoolExecutor(N_THREADS) as pool:
        for run in range(n_runs):
            registry = Registry()
            begin = threading.Barrier(N_THREADS, timeout=SECONDS)
            futures = [
                pool.submit(_look_up, registry, begin, (run + i) % N_THREADS, sorted(names))
                for i in range(N_THREADS)
            ]
            for future in futures:
                modules = future.result(timeout=SECONDS)
                assert modules == {name: name.replace("rule-", "demo_") for name in names}
            assert sorted(counts.imported) == sorted(f"demo_{i}" for i in range(N_NAMES))
            assert not [name for name in registry if name.startswith("mine")]
            counts.imported.clear()
            for i in range(N_NAMES):
                del sys.modules[f"demo_{i}"]


def _look_up(registry, begin, number, names):
    """Look all names up, beginning elsewhere in each thread, and change the registry meanwhile."""
    begin.wait()
    modules = {}
    for i in range(len(names)):
        name = names[(i + 7 * number) % len(names)]
        modules[name] = registry.get(name, validate=False).__module__
        if number % 4 == 0 and i == number:
            registry.register(f"mine-{number}", Mean)
            assert registry.get(f"mine-{number}", validate=False) is Mean
            registry.refresh()
            with registry.temporary({f"mine-too-{number}": Mean}):
                assert f"mine-too-{number}" in registry
            registry.unregister(f"mine-{number}")
        if i % 10 == number % 10:
            assert name in registry
            assert set(registry.names()) >= set(names)
    return modules


def test_each_is_validated_once_and_leaves_the_process_as_it_was(counts, monkeypatch):
    validated, run = [], mtenn_core.testing.check_combination

    def check_combination(*args, name, **kwargs):
        validated.append(name)
        return run(*args, name=name, **kwargs)

    monkeypatch.setattr(mtenn_core.testing, "check_combination", check_combination)
    registry = Registry()
    torch.manual_seed(0)
    before = torch.get_rng_state(), torch.get_default_dtype()
    names = [f"rule-{i}" for i in range(4)] * 4
    with ThreadPoolExecutor(N_THREADS) as pool:
        classes = list(pool.map(registry.get, names, timeout=SECONDS))
    assert len(set(classes)) == 4
    assert sorted(validated) == [f"plugin 'rule-{i}' (demo-{i} 1.0)" for i in range(4)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_default_dtype() == before[1]


def test_a_thread_that_waits_does_not_validate_again(places, monkeypatch):
    """The first lets go of the gate, and is then slow."""
    validated, run, gate = [], mtenn_core.testing.check_combination, threading.RLock()

    class Gate:
        acquire = staticmethod(gate.acquire)

        def release(self):
            gate.release()
            time.sleep(0.2)  # in which the other comes in

    def check_combination(*args, **kwargs):
        validated.append(kwargs["name"])
        time.sleep(0.2)  # in which the other comes to the gate
        return run(*args, **kwargs)

    monkeypatch.setattr(mtenn_core.testing, "check_combination", check_combination)
    monkeypatch.setattr(gates, "_lock", Gate())
    registry = Registry()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(registry.get, ["healthy"] * 2, timeout=SECONDS))
    assert validated == ["plugin 'healthy' (demo-healthy 1.0)"]


def test_one_thread_loads_and_the_others_wait(places, monkeypatch):
    loaded, load = [], loading.load

    def slow_load(record, policy):
        loaded.append(record.name)
        time.sleep(0.2)  # in which the others come
        return load(record, policy)

    monkeypatch.setattr(loading, "load", slow_load)
    registry = Registry()
    with ThreadPoolExecutor(N_THREADS) as pool:
        get = partial(registry.get, validate=False)
        classes = set(pool.map(get, ["healthy"] * N_THREADS, timeout=SECONDS))
    assert len(classes) == 1
    assert loaded == ["healthy"]


def test_a_plugin_that_hangs_does_not_delay_other_plugins(places):
    code = f"import demo_gate; demo_gate.entered.set(); demo_gate.go.wait({SECONDS})\n{COUNTED}"
    (places.site / "demo_counts.py").write_text("imported = []\n")
    (places.site / "demo_gate.py").write_text(
        "import threading\nentered, go = threading.Event(), threading.Event()\n"
    )
    write_distribution(places.site, "demo-slow", {"slow": "demo_slow:Good"}, code)
    gate = __import__("demo_gate")
    registry = Registry()
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(registry.get, "slow")
        assert gate.entered.wait(SECONDS)
        assert pool.submit(registry.get, "healthy").result(SECONDS).__name__ == "Good"
        assert "slow" in registry.names()
        assert not slow.done()
        gate.go.set()
        assert slow.result(SECONDS).__name__ == "Good"


def test_a_setting_that_one_import_changes_is_put_back_where_two_overlap(places):
    """The second begins while the first has changed the dtype, and ends after it."""
    (places.site / "demo_gate.py").write_text(
        "import threading\nfirst, second, done = (threading.Event() for _ in range(3))\n"
    )
    one = "import torch; torch.set_default_dtype(torch.float64); g.first.set(); g.second.wait(30)"
    two = "g.second.set(); g.done.wait(30)"
    for name, code in {"one": one, "two": two}.items():
        code = f"import demo_gate as g; {code}\n{dedent(GOOD)}"
        write_distribution(places.site, f"demo-{name}", {name: f"demo_{name}:Good"}, code)
    gate = __import__("demo_gate")
    registry = Registry()
    with ThreadPoolExecutor(2) as pool, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        first = pool.submit(registry.get, "one", validate=False)
        assert gate.first.wait(SECONDS)
        second = pool.submit(registry.get, "two", validate=False)
        first.result(SECONDS)
        gate.done.set()
        second.result(SECONDS)
    assert torch.get_default_dtype() == torch.float32
    (warning,) = warned
    assert "or another plugin that was imported at the same time" in str(warning.message)
    assert "torch's default dtype" in str(warning.message)


def test_random_numbers_that_another_thread_draws_do_not_come_again(places):
    (places.site / "demo_gate.py").write_text(
        "import threading\nentered, go = threading.Event(), threading.Event()\n"
    )
    code = "import demo_gate as g; g.entered.set(); g.go.wait(30)"
    write_distribution(places.site, "demo-slow", {"slow": "demo_slow:Good"}, code + dedent(GOOD))
    gate = __import__("demo_gate")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(Registry().get, "slow", validate=False)
        assert gate.entered.wait(SECONDS)
        drawn = torch.rand(2)
        gate.go.set()
        slow.result(SECONDS)
    assert not torch.equal(torch.rand(2), drawn)


@pytest.mark.parametrize(
    ("code", "is_restored"),
    [
        pytest.param("torch.manual_seed(1)", True, id="a new seed"),
        pytest.param("torch.rand(1)", False, id="only drawn"),
    ],
)
def test_while_another_thread_lives_only_a_new_seed_is_undone(places, code, is_restored):
    write_distribution(
        places.site, "demo-one", {"one": "demo_one:Good"}, f"import torch; {code}\n{dedent(GOOD)}"
    )
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=[SECONDS])
    before = torch.get_rng_state()
    thread.start()
    try:
        Registry().get("one", validate=False)
        assert thread.is_alive()
    finally:
        end.set()
        thread.join()
    assert torch.equal(torch.get_rng_state(), before) == is_restored


def test_two_threads_that_wait_for_each_other_end(places, monkeypatch):
    """One imports a module that asks for what the other imports, which imports that module.

    Python then lets one of the two go on with half a module, or fail.
    """
    monkeypatch.setattr(locks, "TIMEOUT", 0.5)
    (places.site / "demo_gate.py").write_text(
        "import threading\nmeet = threading.Barrier(2, timeout=30)\nregistry = None\n"
    )
    gate = __import__("demo_gate")
    (places.site / "demo_common.py").write_text(
        "import demo_gate as g\ng.meet.wait()\ng.registry.get('circle', validate=False)\n"
    )
    write_distribution(
        places.site,
        "demo-circle",
        {"circle": "demo_circle:Good"},
        "from mtenn_core import Combination\nclass Good(Combination):\n"
        "    def combine(self, p): return p.mean()\n"
        "import demo_gate as g\ng.meet.wait()\nimport demo_common\n",
    )
    gate.registry = Registry()
    with ThreadPoolExecutor(2) as pool:
        asks = pool.submit(gate.registry.get, "circle", validate=False)
        imports = pool.submit(__import__, "demo_common")
        errors = [asks.exception(SECONDS), imports.exception(SECONDS)]
    assert None in errors
    assert all("deadlock" in str(error) for error in errors if error)
    assert gate.registry.get("circle").__name__ == "Good"


def test_modules_that_the_fixture_removes_are_imported_again(places):
    before = set(sys.modules)
    assert Registry().get("healthy").__module__ == "demo_healthy"
    forget_modules_in(Path(places.site), before)
    assert "demo_healthy" not in sys.modules


def passes_in_a_fork(action):
    """Return whether an action ends in a forked process, and returns True there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork, in a process with threads
        pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # ends this process if the action hangs
        torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
        try:
            os._exit(0 if action() else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def busy(monkeypatch):
    """Run an action in another thread until a function that it calls has begun.

    The call ends with the test.
    """
    begun, end = threading.Event(), threading.Event()
    threads = []

    def start(owner, name, action):
        original = getattr(owner, name)

        def waits(*args, **kwargs):
            if threading.current_thread() in threads:
                begun.set()
                end.wait(SECONDS)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, waits)
        threads.append(threading.Thread(target=action))
        threads[0].start()
        assert begun.wait(SECONDS)

    yield start
    end.set()
    threads[0].join()


def scans(registry):
    return lookup, "scan", registry.names


def gates_one(registry):
    return mtenn_core.testing, "check_combination", lambda: registry.create("healthy")


def imports_one(registry):
    return loading, "_import", lambda: registry.get("healthy", validate=False)


@forks
@pytest.mark.parametrize("does", [scans, gates_one, imports_one])
def test_a_process_forked_while_another_thread_is_busy_does_not_hang(
    places, busy, monkeypatch, does
):
    monkeypatch.setattr(locks, "TIMEOUT", 0.05)  # the time for which the fork waits
    registry = Registry()
    busy(*does(registry))

    def creates():
        locks.TIMEOUT = SECONDS
        return registry.create("healthy") is not None

    assert passes_in_a_fork(creates)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@forks
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("timeout", [SECONDS, 0.05], ids=["waits", "does not wait"])
def test_a_process_forked_during_the_gate_keeps_the_callers_settings(places, monkeypatch, timeout):
    """The gate uses the default dtype of torch, in the whole process."""
    begun, check = threading.Event(), mtenn_core.testing.check_combination

    def slow_check(*args, **kwargs):
        begun.set()
        time.sleep(0.3)  # in which this process forks
        return check(*args, **kwargs)

    monkeypatch.setattr(mtenn_core.testing, "check_combination", slow_check)
    monkeypatch.setattr(locks, "TIMEOUT", timeout)
    with ThreadPoolExecutor(1) as pool:
        gated = pool.submit(Registry().create, "healthy")
        assert begun.wait(SECONDS)
        assert torch.get_default_dtype() == torch.float32
        assert passes_in_a_fork(lambda: torch.get_default_dtype() == torch.float64)
        gated.result()
    assert torch.get_default_dtype() == torch.float64


@forks
@pytest.mark.usefixtures("float64")
def test_a_fork_in_a_block_with_default_settings_stays_in_the_block():
    def ends_in_the_child(block):
        inside = torch.get_default_dtype() == torch.float32
        block.close()
        return inside and torch.get_default_dtype() == torch.float64

    with ExitStack() as block:
        block.enter_context(default_settings())
        assert passes_in_a_fork(lambda: ends_in_the_child(block))
        assert torch.get_default_dtype() == torch.float32


@forks
def test_a_fork_waits_for_the_gate_which_restores_the_random_state(places, monkeypatch):
    begun, check = threading.Event(), mtenn_core.testing.check_combination

    def draws(*args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            begun.set()
            time.sleep(0.2)  # in which this process forks
        return check(*args, **kwargs)

    monkeypatch.setattr(mtenn_core.testing, "check_combination", draws)
    before = torch.get_rng_state()
    with ThreadPoolExecutor(1) as pool:
        gated = pool.submit(Registry().create, "healthy")
        assert begun.wait(SECONDS)
        assert passes_in_a_fork(lambda: torch.equal(torch.get_rng_state(), before))
        gated.result()


@forks
def test_a_lock_of_the_forking_thread_stays_held_in_the_child():
    lock = locks.Lock()

    def is_held_once():
        lock.release()
        return not lock.is_mine

    with lock:
        assert passes_in_a_fork(is_held_once)
        assert lock.is_mine
