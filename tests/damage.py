"""Damaged copies of files: bits flipped, ends cut, values replaced, and the hashes around them made right again.

Where a file is covered by a hash, a flip only tests the hash; `json_damage` and the `seal` of a test go past it, to
what a writer with a mistake, another version or an ill-willed hand could leave. All is drawn from a seeded generator.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

STRANGE = (
    None,
    True,
    -1,
    0,
    3,
    2**70,
    1.5,
    1e308,
    10**400,
    "",
    "x",
    "../../x",
    "\ud800",
    "²",
    [],
    [None],
    ["x", 1],
    {},
    {"x": {}},
)


def byte_damage(good: bytes, cases: int, seed: int = 0) -> Iterator[bytes]:
    """Cut, flipped, overwritten, emptied and appended to."""
    rng = np.random.default_rng(seed)
    yield b""
    yield good + b"\0"
    for case in range(cases):
        at = int(rng.integers(len(good)))
        if case % 4 == 3:  # headers are small parts of large files
            at = int(rng.integers(min(len(good), 600)))
        bad = bytearray(good)
        if case % 3 == 0:
            del bad[at:]
        elif case % 3 == 1:
            bad[at] ^= 1 << int(rng.integers(8))
        else:
            bad[at : at + 8] = rng.bytes(8)
        yield bytes(bad)


def json_damage(good: Any, cases: int, seed: int = 0) -> Iterator[Any]:
    """One value anywhere in a JSON tree replaced by another kind of value, or its key left out."""
    rng = np.random.default_rng(seed)
    yield from ([], None, 3, {}, "x")
    places = list(_places(good))
    for case in range(cases):
        bad = copy.deepcopy(good)
        *path, last = places[case % len(places)] if cases >= len(places) else places[int(rng.integers(len(places)))]
        parent = bad
        for step in path:
            parent = parent[step]
        choice = int(rng.integers(len(STRANGE) + 1))
        if choice == len(STRANGE):
            del parent[last]
        else:
            parent[last] = copy.deepcopy(STRANGE[choice])
        yield bad


def line_damage(good: str, cases: int, seed: int = 0) -> Iterator[str]:
    """`json_damage` of a single line of a JSONL file."""
    rng = np.random.default_rng(seed)
    lines = good.splitlines()
    for case in range(cases):
        k = int(rng.integers(len(lines)))
        *_, bad = json_damage(json.loads(lines[k]), 1, seed=seed + case)
        yield "\n".join([*lines[:k], json.dumps(bad), *lines[k + 1 :]]) + "\n"


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:3]):
            yield from _places(inner, (*path, i))
