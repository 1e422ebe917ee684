"""The digest of a step: the same on a GPU's arithmetic as on the CPU's, and blind to nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldt.data.batch import Batch
from ldt.data.digest import device_digest, digest, digest_text

TEXTS = {
    "classes": None,
    "two times": None,
    "features of patches": None,
    "tokens": (torch.int64, (5,)),
    "features": (torch.float32, (3, 6)),
}
GOLDEN = {2: "0838be7a82397d08", 3: "2ddd922e65956b45"}


def make_batch(text: str = "classes", rows: int = 6, padded: int = 2) -> tuple[Batch, np.ndarray]:
    """Random content, the last rows padding; and each real sample's place in the data set."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(rows, *shape, generator=generator)

    content = None
    if TEXTS[text] is not None:
        kind, shape = TEXTS[text]
        content = (100 * random(*shape)).to(kind)
    index_B, weight_B = torch.arange(rows) + 2**40, torch.ones(rows)
    index_B[rows - padded :], weight_B[rows - padded :] = -1, 0
    batch = Batch(
        index_B=index_B,
        latent_BCHW=random(2, 3, 3),
        noise_BCHW=random(2, 3, 3),
        uniform_B=torch.rand(rows, generator=generator),
        label_B=torch.arange(rows) % 3,
        weight_B=weight_B,
        text=content,
        second_B=torch.rand(rows, generator=generator) if text == "two times" else None,
        target=random(5, 1, 1).half() if text == "features of patches" else None,
    )
    return batch, np.arange(rows - padded, dtype=np.int64) * 7


def on_device(batch: Batch, ordinal_n: np.ndarray) -> int:
    ordinal_B = torch.zeros(len(batch), dtype=torch.int64)
    ordinal_B[: len(ordinal_n)] = torch.from_numpy(ordinal_n)
    return int(device_digest(batch, ordinal_B))


def in_python(batch: Batch, ordinal_n: np.ndarray) -> int:
    """The definition, in Python's integers."""
    mask, total = 2**64 - 1, 0

    def words_of(array):
        return array.view(np.int16 if array.itemsize == 2 else np.int32).astype(np.int64)

    def mix(z):
        z = (z + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    for i, ordinal in enumerate(ordinal_n.tolist()):
        parts = [batch.index_B[i], torch.tensor(ordinal), batch.label_B[i], batch.uniform_B[i]]
        parts += [
            t[i]
            for t in (batch.latent_BCHW, batch.noise_BCHW, batch.text, batch.second_B, batch.target)
            if t is not None
        ]
        words = np.concatenate([words_of(part.numpy().reshape(-1)) for part in parts]).tolist()
        total += mix(sum(w * (mix(k) | 1) for k, w in enumerate(words)) & mask)
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("text", TEXTS)
def test_numpy_torch_and_the_definition_agree(text):
    batch, ordinal_n = make_batch(text)
    assert digest(batch, ordinal_n, 3) == on_device(batch, ordinal_n) == in_python(batch, ordinal_n)


@pytest.mark.parametrize("version", GOLDEN)
def test_digests_never_change(version):
    """If this fails, no record can be verified: raise rng.VERSION instead of editing the numbers."""
    rows = torch.arange(36).view(2, 2, 3, 3) / 8
    batch = replace(make_batch(rows=2, padded=0)[0], latent_BCHW=rows, noise_BCHW=-rows)
    batch = replace(batch, uniform_B=torch.tensor([0.25, 0.75]))
    assert digest_text(digest(batch, np.array([3, 1]), version)) == GOLDEN[version]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_every_number_counts(version, text):
    batch, ordinal_n = make_batch(text)
    whole, seen = digest(batch, ordinal_n, version), set()
    for name, value in batch.tensors():
        flat = value.view(len(batch), -1)
        for place in range(flat.shape[1] if name != "weight_B" else 0):
            for row in range(len(batch)):
                changed = flat.clone()
                changed[row, place] += 1
                now = digest(replace(batch, **{name: changed.view(value.shape)}), ordinal_n, version)
                assert (now == whole) == (row >= len(ordinal_n)), (name, place, row, "padding counts nothing")
                seen.add(now)
    assert digest(batch, ordinal_n + 1, version) != whole
    assert len(seen) > 4 * 36


@pytest.mark.parametrize("version", [2, 3])
def test_it_does_not_depend_on_how_the_samples_are_divided(version):
    batch, ordinal_n = make_batch(padded=0)
    parts = [digest(batch.rows(i, i + 2), ordinal_n[i : i + 2], version) for i in (0, 2, 4)]
    assert digest_text(sum(parts)) == digest_text(digest(batch, ordinal_n, version))
    assert digest(batch, ordinal_n[:0], version) == 0
