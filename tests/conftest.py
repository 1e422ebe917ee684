"""Shared fixtures."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator

import pytest
import torch
from pool import Pool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(n)` is a pool of n processes, started on first use and shared by the whole session."""
    pools: dict[int, Pool] = {}

    def get(size: int) -> Pool:
        return pools.setdefault(size, Pool(size))

    yield get
    for p in pools.values():
        p.close()
