"""Latents that LightningDiT has extracted: safetensors files of `latents` [N, C, H, W], `labels` [N] and, for the
mirrored images, `latents_flip`. They are posterior draws as the autoencoder gives them, not scaled."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ldt.data.latent_files import LatentFiles
from ldt.errors import InputError, by_reason, file_error

LATENTS, FLIPPED, LABELS = "latents", "latents_flip", "labels"


class SafetensorsFiles(LatentFiles):
    """A directory of such files. A draw counts as a posterior of deviation 0."""

    def __init__(self, where: Path, files: list[Path]) -> None:
        self.where, self.files = where, sorted(files)
        self._open: dict[int, Any] = {}
        self._lock = threading.Lock()
        shapes = [self._shapes(k) for k in range(len(self.files))]
        for file, shape in zip(self.files, shapes, strict=True):
            if shape.keys() != shapes[0].keys() or shape[LATENTS][1:] != shapes[0][LATENTS][1:]:
                raise InputError(f"latents {file} are not like those of {self.files[0]}; give files of one extraction")
        self.flips = FLIPPED in shapes[0]
        counts = [shape[LATENTS][0] for shape in shapes]
        self._file_n = np.repeat(np.arange(len(counts)), counts)
        self._row_n = np.concatenate([np.arange(n) for n in counts])
        if not len(self._row_n):
            raise InputError(f"latents={where} holds no latents; extract them again")
        channels, height, width = shapes[0][LATENTS][1:]
        self.latent_shape = (channels, height, width)
        self.labels = np.concatenate(
            [self._tensor(k, LABELS, slice(None)).astype(np.int64) for k in range(len(counts))]
        )
        self._name_classes()

    def __len__(self) -> int:
        return len(self._row_n)

    def name(self, i: int) -> str:
        return f"{self.files[self._file_n[i]]}, sample {self._row_n[i]}"

    def key(self, i: int) -> str:
        return f"{self.files[self._file_n[i]].name} {self._row_n[i]}"

    def size(self, i: int) -> int:
        try:
            return self.files[self._file_n[i]].stat().st_size
        except OSError:
            return -1  # it can't be what it was

    def moments(self, i: int) -> NDArray[np.float32]:
        return self._draw(i, LATENTS)

    def views(self, i: int, flips: bool) -> list[NDArray[np.float32]]:
        return super().views(i, flips) + ([self._draw(i, FLIPPED)] if flips else [])

    def _draw(self, i: int, name: str) -> NDArray[np.float32]:
        mean = self._tensor(int(self._file_n[i]), name, int(self._row_n[i])).astype(np.float32)
        return np.stack([mean, np.zeros_like(mean)])

    def _label(self, i: int) -> int:
        return int(self.labels[i])

    def _shapes(self, k: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a file's tensors, checked to be consistent."""
        file = self.files[k]
        try:
            with safe_open(file, "pt") as held:
                shapes = {n: tuple(held.get_slice(n).get_shape()) for n in held.keys()}  # noqa: SIM118  (no mapping)
        except OSError as error:
            raise file_error(f"latents {file}", error, "extract them again") from None
        except SafetensorError as error:
            raise InputError(f"latents {file} are not a whole safetensors file ({error}); extract them again") from None
        shapes = {n: s for n, s in shapes.items() if n in (LATENTS, FLIPPED, LABELS)}
        latents, labels = shapes.get(LATENTS, ()), shapes.get(LABELS, ())
        if len(latents) != 4 or labels != latents[:1] or shapes.get(FLIPPED, latents) != latents:
            raise InputError(
                f"latents {file} hold {shapes}; expected are latents [N, C, H, W], labels [N] and perhaps latents_flip"
            )
        return shapes

    def _tensor(self, k: int, name: str, row: Any) -> NDArray[Any]:
        try:
            with self._lock:
                if k not in self._open:
                    self._open = {k: safe_open(self.files[k], "pt")}  # neighbours are asked for one after another
                tensor = self._open[k].get_slice(name)[row]
            return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        except (OSError, SafetensorError) as error:
            raise by_reason(f"latents {self.files[k]} can't be read ({error}); extract them again", error) from None
