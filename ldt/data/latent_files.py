"""Latents that other projects have written, one file an image: trees of .npy (fast-DiT, REPA) or .npz.

fast-DiT: `<name>_features/<i>.npy`, a posterior draw [1, C, H, W] times 0.18215, beside `<name>_labels/<i>.npy`, its
class. .npz: one directory of files with `moments` [2·C, H, W], mean and logarithm of the variance as autoencoders give
them, and `label`. (U-ViT's own .npy files are pickles, which are never read; docs/models.md says how to convert them.)
"""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldt.data.images.labels_file import LABELS, listed_labels
from ldt.errors import InputError, by_reason, file_error
from ldt.files import MOST_CLASSES, beside_threads, class_names, load_npy


class LatentFiles(ABC):
    """Numbered latents with a class each; `moments` is float32 [2, C, H, W], mean and standard deviation, unscaled."""

    captioned = 0
    flips = False  # whether there are latents of the mirrored images too

    def __init__(self, where: Path, files: list[Path]) -> None:
        self.where = where
        self.files = sorted(files, key=lambda p: (len(p.stem), p.stem))  # 9.npy comes before 10.npy
        first = self.moments(0)
        self.latent_shape: tuple[int, int, int] = first.shape[1:]
        self.labels = np.array([self._label(i) for i in range(len(self.files))], np.int64)
        self._name_classes()

    def _name_classes(self) -> None:
        if self.labels.min() < 0:
            raise InputError(f"{self.name(int(self.labels.argmin()))} has a negative label; labels count from 0")
        if self.labels.max() >= MOST_CLASSES:
            raise InputError(
                f"{self.name(int(self.labels.argmax()))} has the label {self.labels.max()}, but {MOST_CLASSES:,} "
                "classes are the most; correct it"
            )
        self.classes = tuple(class_names(self.where, int(self.labels.max())))

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        """Where latent i comes from, for messages."""
        return str(self.files[i])

    def key(self, i: int) -> str:
        """The name of latent i within its source."""
        return self.files[i].relative_to(self.where).as_posix()

    def size(self, i: int) -> int:
        """Bytes of its file as it is now."""
        try:
            return self.files[i].stat().st_size
        except OSError:
            return -1  # it can't be what it was

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def caption(self, i: int) -> str:
        """Latents have no captions."""
        return ""

    def caption_size(self, i: int) -> int:
        """Latents have no captions."""
        return -1

    def remarks(self) -> list[str]:
        """Nothing to warn of: every file is read and checked."""
        return []

    def views(self, i: int, flips: bool) -> list[NDArray[np.float32]]:
        """`moments`, of the same shape as all others, and with `flips` those of the mirrored image."""
        assert not flips or self.flips
        moments = self.moments(i)
        if moments.shape[1:] != self.latent_shape:
            raise InputError(
                f"latent {self.name(i)} has the shape {moments.shape[1:]}, the first one has {self.latent_shape}"
            )
        return [moments]

    @abstractmethod
    def moments(self, i: int) -> NDArray[np.float32]: ...

    @abstractmethod
    def _label(self, i: int) -> int: ...


class DrawFiles(LatentFiles):
    """fast-DiT's tree. A draw counts as a posterior of deviation 0."""

    def __init__(self, where: Path, features: Path, labels: Path, scale: float) -> None:
        self._labels, self._scale = labels, scale
        files = listed(features, ".npy")
        extra = sorted({p.name for p in listed(labels, ".npy")} - {p.name for p in files})
        if extra:
            raise InputError(
                f"{labels} has {len(extra):,} labels without a latent in {features}, such as {extra[0]}; restore "
                "the latents, or remove these labels"
            )
        super().__init__(where, files)

    def moments(self, i: int) -> NDArray[np.float32]:
        draw = load(self.files[i])
        if draw.ndim == 4 and len(draw) == 1:
            draw = draw[0]
        if draw.ndim != 3 or draw.dtype.kind != "f":
            raise InputError(f"latent {self.name(i)} is {draw.dtype} {draw.shape}, not floats of [1, C, H, W]")
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused with the name of its image
            mean = draw.astype(np.float32) / np.float32(self._scale)
        return np.stack([mean, np.zeros_like(mean)])

    def _label(self, i: int) -> int:
        path = self._labels / self.files[i].name
        if not path.exists():
            raise InputError(f"latent {self.name(i)} has no label {path}; both trees number their files alike")
        return _number(load(path), path)


class MomentFiles(LatentFiles):
    """A directory of .npz files. second: what stands after the mean, `log_variance` or `std`."""

    def __init__(self, where: Path, files: list[Path], second: str) -> None:
        self._second = second
        super().__init__(where, files)
        if second == "log_variance":
            self._refuse_deviations()

    def moments(self, i: int) -> NDArray[np.float32]:
        both = _member(self.files[i], "moments")
        if both.ndim != 3 or len(both) % 2 or both.dtype.kind != "f":
            raise InputError(f"{self.name(i)}: moments are {both.dtype} {both.shape}, not floats of [2*C, H, W]")
        mean, second = np.split(both.astype(np.float32), 2)
        if self._second == "std":
            if (second < 0).any():
                raise InputError(
                    f"{self.name(i)}: a standard deviation is below 0; latents_second=log_variance is for such moments"
                )
            return np.stack([mean, second])
        return np.stack([mean, np.exp(0.5 * np.clip(second, -30, 20))])  # the limits of diffusers' posterior

    def _refuse_deviations(self) -> None:
        """Deviations are never below 0, and the logarithm of a variance is nearly always, somewhere in an image."""
        some = np.linspace(0, len(self.files) - 1, min(16, len(self.files))).astype(int).tolist()
        if not any((np.split(_member(self.files[i], "moments"), 2)[1] < 0).any() for i in some):
            raise InputError(
                f"the second half of the moments in {self.where} is nowhere below 0, as standard deviations are and "
                "logarithms of variances are not; set latents_second=std if they are [mean, std], as REPA writes them"
            )

    def _label(self, i: int) -> int:
        return _number(_member(self.files[i], "label"), self.files[i])


class RepaFiles(LatentFiles):
    """REPA's tree: `00000/img-mean-std-00000000.npy`, mean and standard deviation [2·C, H, W], and `dataset.json`."""

    def __init__(self, where: Path) -> None:
        file = where / LABELS
        try:
            names, label_n = listed_labels(file.read_bytes(), str(file))
        except OSError as error:
            raise file_error(str(file), error, "write it again") from None
        if not len(names):
            raise InputError(f'{file} names no latents; it needs {{"labels": [[file, class number], …]}}')
        if len(twice := names.repeated()):
            raise InputError(f"{file} names {names[int(twice[0])]} twice; give each file one label")
        self._known = dict(zip(names, label_n.tolist(), strict=True))
        super().__init__(where, [where / name for name in self._known])
        self.files = sorted(self.files)
        self.labels = np.array([self._label(i) for i in range(len(self.files))], np.int64)

    def moments(self, i: int) -> NDArray[np.float32]:
        both = load(self.files[i])
        if both.ndim != 3 or len(both) % 2 or both.dtype.kind != "f":
            raise InputError(f"{self.name(i)}: moments are {both.dtype} {both.shape}, not floats of [2*C, H, W]")
        mean, std = np.split(both.astype(np.float32), 2)
        if (std < 0).any():
            raise InputError(f"{self.name(i)}: a standard deviation is below 0; REPA's are [mean, std]")
        return np.stack([mean, std])

    def _label(self, i: int) -> int:
        return self._known[self.key(i)]


def listed(directory: Path, ending: str) -> list[Path]:
    """What is in a directory under names of that ending; `Path.glob` passes over what may not be read."""
    try:
        return sorted(directory / name for name in os.listdir(directory) if name.endswith(ending) and name[0] != ".")
    except OSError as error:
        raise file_error(f"directory {directory}", error, "check it") from None


def load(path: Path) -> NDArray[Any]:
    try:
        return load_npy(path)
    except ValueError as error:
        if "pickle" in str(error):
            raise InputError(
                f"latent {path} is a pickle, as U-ViT writes them, and pickles are never read; write it again as an "
                ".npz of `moments` and `label`"
            ) from None
        raise InputError(f"latent {path} is damaged ({error}); write it again") from None
    except OSError as error:
        raise file_error(f"latent {path}", error, "write it again") from None


def _member(path: Path, key: str) -> NDArray[Any]:
    def read() -> NDArray[Any]:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return archive[key]

    try:
        return beside_threads(read)
    except KeyError:
        raise InputError(f"latent {path} has no `{key}`; it needs `moments` and `label`") from None
    except OSError as error:
        raise file_error(f"latent {path}", error, "write it again") from None
    except Exception as error:  # numpy and zipfile raise a dozen types over a damaged file
        raise by_reason(f"latent {path} can't be read ({error}); write it again", error) from None


def _number(array: NDArray[Any], path: Path) -> int:
    if array.size != 1 or array.dtype.kind not in "iu":
        raise InputError(f"the label in {path} is {array.dtype} {array.shape}, not one whole number")
    return int(array.reshape(-1)[0])
