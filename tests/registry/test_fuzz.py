"""Whatever a distribution's files say, the registry works on and no healthy name is lost."""

import importlib
import json
import shutil
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from installed import write_distribution
from tiers import slow

from mtenn_core import Registry

GROUP = "mtenn.combinations"
words = st.sampled_from(
    [
        "healthy",
        "bad",
        "a-b",
        "A_B",
        "größe",
        "",
        " ",
        "=",
        "x:Y",
        "demo:",
        "[",
        "]",
        "#",
        ":",
        "\0",
    ]
) | st.text(max_size=8)
lines = st.one_of(
    st.just(f"[{GROUP}]"),
    words.map("[{}]".format),
    st.builds("{} = {}".format, words, words),
    st.lists(words, max_size=4).map(" ".join),
)
fields = st.one_of(
    st.builds("Name: {}".format, words),
    st.builds("Version: {}".format, words | st.sampled_from(["1.0", "2!3.post1", "one"])),
    st.builds(
        "Requires-Dist: {}{}".format,
        st.sampled_from(["mtenn-core", "Mtenn_Core", "torch", ""]),
        words
        | st.sampled_from(
            [
                ">=0.1",
                "<0.1",
                "[x]; extra=='y'",
                "; python_version<'3'",
                "; python_version ~= 'abc'",
                ">>",
                ";" + "(" * 3000,
            ]
        ),
    ),
    st.lists(words, max_size=3).map(" ".join),
)


# Version, whether it is an egg-info, and whether it is in front; one folder is there once.
copies = st.lists(
    st.tuples(
        st.sampled_from(["1.0", "0.9", "2!3.post1", "one", ""]), st.booleans(), st.booleans()
    ),
    min_size=1,
    max_size=2,
    unique_by=lambda copy: copy[copy[1] :],
)


def files(of):
    text = st.lists(of, max_size=8).map("\n".join)
    encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
    encoded = st.builds(lambda t, e: t.encode(e, errors="replace"), text, encodings)
    return encoded | st.binary(max_size=64)


@pytest.fixture
def alone(places):
    """Let nothing else be on the path; a scan is then quick."""
    import numpy.random  # noqa: F401 - hypothesis imports it later, and could not

    assert Registry().problems() is not None  # which has imported what it needs
    sys.path[:] = [str(places.site), str(places.front)]
    return places


@pytest.mark.parametrize("n_examples", [200, *slow(2000, reason="ten times as long")])
def test_no_file_breaks_the_registry(alone, n_examples):
    @settings(max_examples=n_examples, deadline=None)
    @given(
        entry_points=files(lines),
        metadata=files(fields) | st.just(b""),
        copies=copies,
        asked=st.lists(words, max_size=3),
    )
    def check(entry_points, metadata, copies, asked):
        written = [
            write_distribution(
                alone.front if in_front else alone.site,
                "demo-bad",
                entry_points,
                None,
                version=version,
                metadata=metadata,
                egg=egg,
            )
            for version, egg, in_front in copies
        ]
        importlib.invalidate_caches()
        try:
            registry = Registry()
            assert registry.info("demo-healthy:healthy").target == "demo_healthy:Good"
            assert "healthy" in registry.names()
            assert len(registry.records(everything=True)) >= len(registry)
            for record in registry.records(everything=True):
                json.dumps(record.to_json())
                assert str(record)
            for problem in registry.problems():
                json.dumps(problem.to_json())
            for word in asked:
                word in registry  # noqa: B015 - must not raise
        finally:
            for info in written:
                shutil.rmtree(info)

    check()
