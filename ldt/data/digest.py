"""The digest of a step: the sum over its samples, modulo 2⁶⁴, of a hash of all that the network could see of each.

A sum does not depend on how the samples are divided over ranks and micro-batches. With random numbers of version 2 the
hash is xxh64; with version 3 it is exact integer arithmetic, which a GPU does as well: `device_digest`.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xxhash
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ldt import rng
from ldt.data.batch import Batch

Ints = NDArray[np.int64]


def digest(batch: Batch, ordinal_n: Ints, version: int) -> int:
    """Of the first rows of a CPU batch, as a signed int64. Flip and posterior draw enter through the latent they made.

    ordinal_n: each sample's place in the data set; version: of the random numbers.
    """
    n = len(ordinal_n)
    small = np.empty(n, [("ints", "<i8", 3), ("uniform", "<f4")])
    small["ints"] = np.stack([batch.index_B.numpy()[:n], ordinal_n, batch.label_B.numpy()[:n]], axis=1)
    small["uniform"] = batch.uniform_B.numpy()[:n]
    rows = [small, *(tensor.numpy()[:n] for tensor in _large(batch))]
    total = _xxh64_sum(rows) if version == 2 else _weighted_sum(rows)
    return (total + 2**63) % 2**64 - 2**63


def digest_text(total: int) -> str:
    """The sum over ranks, as it is logged: 16 hexadecimal digits."""
    return f"{total % 2**64:016x}"


def _large(batch: Batch) -> list[Tensor]:
    there = (batch.text, batch.second_B, batch.target, batch.token_noise_BF)
    return [batch.latent_BCHW, batch.noise_BCHW] + [x for x in there if x is not None]


# ---------------------------------------------------------------------------------------------------------- version 3


def _weighted_sum(rows: list[NDArray[Any]]) -> int:
    """A row is its words w of 32 bits (of 16 where its numbers have no more), as signed numbers: mix(Σ w_i·m_i), with
    odd multipliers m of 64 bits.
    """
    hash_n, done = np.zeros(len(rows[0]), np.uint64), 0
    for array in rows:
        words = array.view(np.int16 if array.itemsize == 2 else np.int32)
        word_nW = words.reshape(len(array), -1) if array.size else np.empty((len(array), 0), np.int32)
        _add_products(word_nW, multipliers(done + word_nW.shape[1])[done:], hash_n)
        done += word_nW.shape[1]
    return int(rng.mix(hash_n, np.uint64(0)).sum(dtype=np.uint64))


@lru_cache(8)
def multipliers(count: int) -> NDArray[np.uint64]:
    """The odd multiplier of each word of a row: uint64 [count]."""
    return rng.mix(np.arange(count, dtype=np.uint64), np.uint64(0)) | np.uint64(1)


@njit(nogil=True)
def _add_products(word_nW, multiplier_W, hash_n):  # type: ignore[no-untyped-def]
    for row in range(len(hash_n)):
        total = np.uint64(0)
        for i in range(len(multiplier_W)):
            total += np.uint64(np.int64(word_nW[row, i])) * multiplier_W[i]
        hash_n[row] += total


def device_digest(batch: Batch, ordinal_B: Tensor) -> Tensor:
    """`digest` of version 3 by operations of torch, on the batch's device: a scalar int64. Padding counts nothing.

    ordinal_B: int64, each sample's place in the data set.
    """
    small = torch.stack([batch.index_B, ordinal_B, batch.label_B], 1)
    content = [
        x.view(len(ordinal_B), -1).view(torch.int16 if x.element_size() == 2 else torch.int32)
        for x in (small, batch.uniform_B, *_large(batch))
    ]
    multiplier_W = _multipliers_on(ordinal_B.device, sum(x.shape[1] for x in content))
    hash_B, done = torch.zeros_like(ordinal_B), 0
    for word_BW in content:
        hash_B += (word_BW * multiplier_W[done : done + word_BW.shape[1]]).sum(1)
        done += word_BW.shape[1]
    mixed_B = (hash_B + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed_B = (mixed_B ^ (mixed_B >> shift & (1 << 64 - shift) - 1)) * _signed(factor)  # the shift keeps the sign
    return (mixed_B * (batch.weight_B > 0)).sum()


@lru_cache(8)
def _multipliers_on(device: torch.device, count: int) -> Tensor:
    return torch.from_numpy(multipliers(count).view(np.int64)).to(device)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


# ---------------------------------------------------------------------------------------------------------- version 2


def _xxh64_sum(rows: list[NDArray[Any]]) -> int:
    total = 0
    for row in zip(*map(_rows_of, rows), strict=True):
        h = xxhash.xxh64()
        for content in row:
            h.update(content)
        total += h.intdigest()
    return total


def _rows_of(array: NDArray[Any]) -> list[memoryview]:
    """The bytes of each row; much cheaper than indexing the array."""
    content = array.reshape(-1).view(np.uint8).data
    size = len(content) // max(len(array), 1)
    return [content[i * size : (i + 1) * size] for i in range(len(array))]
