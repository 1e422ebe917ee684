"""Everything random about a sample, as functions of (seed, purpose, key), and what the network is given of it.

The key of a training sample is its global index. Ranks, threads, micro-batches, shard formats and time play no part,
which `ldt.data.digest` proves.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ldt import rng
from ldt.data import philox
from ldt.data.shards import Manifest, Records, Shards
from ldt.rng import Purpose

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Rows of weight 0 are padding: finite, and to be left out of every mean.

    index_B: int64 global sample index (-1 for padding); latent_BCHW: whitened posterior draw, float32;
    noise_BCHW: standard normal, float32; uniform_B: float32 strictly between 0 and 1, for the timestep;
    label_B: int64, the number of classes where the condition is dropped; weight_B: float32, 1 or 0. text: token numbers
    int64 [B, M] or features float32 [B, M, F], zero where there is no text; None for a denoiser of classes alone.
    second_B: float32, for a second time (`objective.mean_flow`), 0 where there is none; None without mean flow.
    target: float16 [B, F, G, G], features of patches to be aligned with; None where nothing is. token_noise_BF:
    standard normal, float32, for the class token that they give; None where none is denoised.
    intervals: how many rows have a second time, counted on the host, so that no one need ask the device.
    """

    index_B: torch.Tensor
    latent_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    uniform_B: torch.Tensor
    label_B: torch.Tensor
    weight_B: torch.Tensor
    text: torch.Tensor | None = None
    second_B: torch.Tensor | None = None
    target: torch.Tensor | None = None
    token_noise_BF: torch.Tensor | None = None
    intervals: int = 0

    @classmethod
    def padding(
        cls,
        rows: int,
        manifest: Manifest,
        pin: bool,
        text: bool = False,
        mean_flow: bool = False,
        target: bool = False,
        token: bool = False,
    ) -> "Batch":
        """Rows of padding, to be overwritten."""
        latent_shape, words, features, token_noise_BF = manifest.latent_shape, None, None, None
        if target and manifest.layout.target:
            features = torch.zeros((rows, *manifest.layout.target), dtype=torch.float16, pin_memory=pin)
            token_noise_BF = torch.zeros((rows, manifest.layout.target[0]), pin_memory=pin) if token else None
        if text and manifest.text_shape:
            kind = torch.int64 if manifest.text_shape.vocabulary else torch.float32
            words = torch.zeros((rows, *manifest.layout.text_shape), dtype=kind, pin_memory=pin)
        return cls(
            index_B=torch.full((rows,), -1, dtype=torch.int64, pin_memory=pin),
            latent_BCHW=torch.zeros((rows, *latent_shape), pin_memory=pin),
            noise_BCHW=torch.zeros((rows, *latent_shape), pin_memory=pin),
            uniform_B=torch.full((rows,), 0.5, pin_memory=pin),
            label_B=torch.full((rows,), len(manifest.classes), dtype=torch.int64, pin_memory=pin),
            weight_B=torch.zeros(rows, pin_memory=pin),
            text=words,
            second_B=torch.zeros(rows, pin_memory=pin) if mean_flow else None,
            target=features,
            token_noise_BF=token_noise_BF,
        )

    def __len__(self) -> int:
        return len(self.index_B)

    def rows(self, start: int, stop: int) -> "Batch":
        """A view of some rows."""
        rows: dict[str, Any] = {name: value[start:stop] for name, value in self.tensors()}
        return replace(self, **rows)

    def to(self, device: torch.device) -> "Batch":
        """A copy on a device; asynchronous from pinned memory. On the CPU the batch itself."""
        copies: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in self.tensors()}
        return replace(self, **copies)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """All tensors of the batch; without text there is none for it."""
        return [(name, value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)]


class Located(NamedTuple):
    """Samples to read: key_n, by which their draws are made; shard_n and sample_n, where they lie. All int64 [n]."""

    key_n: Ints
    shard_n: Ints
    sample_n: Ints


@dataclass(frozen=True)
class SampleDraws:
    """The random choices about samples: functions of (seed, purpose, key) alone.

    label_drop: probability with which the condition is left out, for guidance. Of class and text together as many
    samples again lose only the class, and as many only the text, so that either can be asked for alone.
    condition_on: class, text or class_and_text; flips: whether half of the samples are mirrored; mean_flow: the share
    of samples that have a second time; target: whether the features of patches are read; token: whether the class token
    that these give is noised; version: of the random numbers, that which the run began with.
    """

    seed: int
    label_drop: float = 0.0
    condition_on: str = "class"
    flips: bool = False
    mean_flow: float = 0.0
    target: bool = False
    token: bool = False
    version: int = rng.VERSION

    @property
    def uses_text(self) -> bool:
        """Whether the denoiser is given captions."""
        return self.condition_on != "class"

    def fill(self, batch: Batch, shards: Shards, samples: Located) -> None:
        """Write the samples into the first rows of a CPU batch."""
        records = self.read(shards, samples, text=batch.text is not None)
        self.draw(batch, shards.manifest, records, samples.key_n)

    def read(self, shards: Shards, samples: Located, text: bool) -> Records:
        """What is stored of the samples, of the mirrored image for those that are drawn so."""
        flip_n = self._uniform(Purpose.FLIP, samples.key_n, 1)[:, 0] >= 0.5 if self.flips else None
        return shards.read(samples.shard_n, samples.sample_n, flip_n, text=text, target=self.target)

    def draw(self, batch: Batch, manifest: Manifest, records: Records, key_n: Ints) -> None:
        """Write what was read, and everything random about it, into the first rows of a CPU batch."""
        self.draw_all_but_latents(batch, manifest, records, key_n)
        latent_nCHW, noise_nCHW = (x.numpy()[: len(key_n)] for x in (batch.latent_BCHW, batch.noise_BCHW))
        std_nCHW = records.std_nCHW if manifest.posterior else None
        self.draw_latents(latent_nCHW, noise_nCHW, key_n, records.mean_nCHW, std_nCHW, manifest.whitening)

    def draw_all_but_latents(self, batch: Batch, manifest: Manifest, records: Records, key_n: Ints) -> None:
        """Write all but latents and noise into the first rows of a CPU batch; the others are padding then."""
        n = len(key_n)
        batch.uniform_B.numpy()[:n] = _inside(self._uniform(Purpose.TIMESTEP, key_n, 1)[:, 0])
        if batch.second_B is not None:
            share_n, second_n = self._uniform(Purpose.MEAN_FLOW, key_n, 2).T
            batch.second_B.numpy()[:n] = np.where(share_n < self.mean_flow, _inside(second_n), 0)
        no_label, no_text = self._dropped(key_n)
        batch.label_B.numpy()[:n] = np.where(no_label, len(manifest.classes), records.label_n)
        if batch.text is not None and records.text_n is not None:
            text_n = batch.text.numpy()[:n]
            text_n[:] = records.text_n
            text_n[no_text] = 0
        if batch.target is not None and records.target_n is not None:
            batch.target.numpy()[:n] = records.target_n
        if batch.token_noise_BF is not None:
            self._fill_normal(Purpose.TOKEN_NOISE, key_n, batch.token_noise_BF.numpy()[:n])
        batch.index_B[n:], batch.weight_B[n:] = -1, 0.0
        batch.index_B.numpy()[:n], batch.weight_B.numpy()[:n] = key_n, 1.0

    def draw_latents(
        self, latent_nCHW: Any, noise_nCHW: Any, key_n: Any, mean_nCHW: Any, std_nCHW: Any, whitening: Any
    ) -> None:
        """Write latent and noise, all of them arrays of numpy or all tensors of one device.

        latent = (mean + std·ε − mean_C) / std_C, in float32 and in this order, so that every machine gets the same
        bits. Without a posterior std is None and nothing is drawn for it.
        """
        if std_nCHW is None:
            latent_nCHW[:] = mean_nCHW
        else:
            self._fill_normal(Purpose.POSTERIOR, key_n, latent_nCHW)
            latent_nCHW *= std_nCHW
            latent_nCHW += mean_nCHW
        mean, std = whitening
        latent_nCHW -= mean
        latent_nCHW /= std
        self._fill_normal(Purpose.NOISE, key_n, noise_nCHW)

    def _dropped(self, key_n: Ints) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which samples lose their class and which lose their text: bool [n] each."""
        both, one = self._uniform(Purpose.CONDITION_DROP, key_n, 2).T
        no_label = no_text = both < self.label_drop
        if self.condition_on == "class_and_text":
            no_label, no_text = no_label | (one < self.label_drop), no_text | (one >= 1 - self.label_drop)
        return no_label, no_text

    def _uniform(self, purpose: Purpose, key_n: Ints, n: int) -> NDArray[np.float64]:
        numbers = rng if self.version == 2 else philox
        return numbers.uniform(self.seed, purpose, key_n, n)

    def _fill_normal(self, purpose: Purpose, key_n: Any, out_nCHW: Any) -> None:
        if len(key_n) == 0:
            return
        out_nN = out_nCHW.reshape(len(key_n), -1)
        if isinstance(out_nN, torch.Tensor) and out_nN.is_cuda:
            from ldt.data import philox_triton  # which a CPU's environment does not have

            philox_triton.fill_normal(self.seed, purpose, key_n, out_nN)
        else:
            numbers = rng if self.version == 2 else philox
            numbers.fill_normal(self.seed, purpose, np.asarray(key_n), np.asarray(out_nN))


def _inside(uniform_n: NDArray[np.float64]) -> NDArray[np.float64]:
    """The numbers cut to 23 bits and a half: exact in float32, never 0 and never 1."""
    return (np.floor(uniform_n * 2.0**23) + 0.5) * 2.0**-23
