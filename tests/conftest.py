"""Shared fixtures."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of every process that tests start, whatever the shell says

import atexit
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pool import Pool

pytest_plugins = ["cluster", "cluster_runs", "encoding_cases", "unprivileged"]  # their fixtures, for all files

torch.set_num_threads(1)
LONGEST = [f"test_{name}" for name in ("slurm", "launchers", "demo", "checkpoint", "chaos", "watchdog", "deepspeed")]
HERE = Path(__file__).parent
PATHS = [str(HERE.parent / "tools"), str(HERE / "interpreters")]  # of tests' own processes, which import from there too
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*PATHS, os.environ.get("PYTHONPATH")]))
os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp()  # see interpreters/sitecustomize.py
atexit.register(shutil.rmtree, os.environ["NUMBA_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker is alone with one in the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(n)` is a pool of n processes, started on first use and shared by the whole session."""
    pools: dict[int, Pool] = {}

    def get(size: int) -> Pool:
        return pools.setdefault(size, Pool(size))

    yield get
    for p in pools.values():
        p.close()


@pytest.fixture(autouse=True)
def kept_logger() -> Iterator[None]:
    """Undo what the command line does to the logger: it would keep writing to this test's stderr."""
    root = logging.getLogger("ldt")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before
