"""Images in an .npz as ADM's evaluator takes them and `ldt sample format=npz` writes them: arr_0, arr_1 for labels."""

import io
import zipfile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldt.data.images.archives import stored_at
from ldt.data.images.blobs import Blob, open_blob
from ldt.data.images.listed import SINGLE_CLASS
from ldt.data.images.source import ImageSource
from ldt.errors import InputError, RunError
from ldt.files import MOST_CLASSES, load_npy, npy_header

IMAGES, LABELS = "arr_0.npy", "arr_1.npy"


class NpzImages(ImageSource):
    """uint8 images [N, H, W, 1 or 3], read one at a time where they are stored without compression."""

    def __init__(self, path: str) -> None:
        self._path, blob = path, open_blob(path)
        try:
            with blob.stream() as stream, zipfile.ZipFile(stream) as archive:
                names = archive.namelist()
                if IMAGES not in names:
                    raise InputError(f"{path} holds no images: its arrays are {_listed(names)}, and images are arr_0")
                entry = archive.getinfo(IMAGES)
                self._array = _rows(blob, entry) if not entry.compress_type else _array(archive, IMAGES)
                labels = _array(archive, LABELS) if LABELS in names else np.zeros(len(self._array), np.int64)
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is not readable as .npz ({error}); write or download it again") from None
        self._check(self._array.shape, self._array.dtype, labels)
        self._labels = labels
        largest = int(labels.max())
        self.classes = tuple(map(str, range(largest + 1))) if LABELS in names else (SINGLE_CLASS,)

    def _check(self, shape: tuple[int, ...], kind: np.dtype, labels: NDArray) -> None:
        if kind != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
            raise InputError(
                f"{self._path} has no images but {kind} {list(shape)} in arr_0; images are uint8 [N, H, W, 1 or 3]"
            )
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
            raise InputError(f"{self._path} has {labels.dtype} {list(labels.shape)} in arr_1; labels are a number each")
        if labels.min() < 0 or labels.max() >= MOST_CLASSES:
            raise InputError(f"{self._path} has labels from {labels.min()} to {labels.max()}; they are numbers from 0")

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def key(self, i: int) -> str:
        return str(i)

    def name(self, i: int) -> str:
        return f"{self._path}/{i}"

    def image(self, i: int) -> Image.Image:
        image_HWC = self._array[i]
        return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)


class _Rows:
    """An array of a file, whose rows are read as they are asked for."""

    def __init__(self, blob: Blob, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._blob, self._offset, self.shape, self.dtype = blob, offset, shape, dtype
        self._size = int(np.prod(shape[1:])) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        content = self._blob.read(self._offset + i * self._size, self._size)
        return np.frombuffer(content, self.dtype).reshape(self.shape[1:])


def _rows(blob: Blob, entry: zipfile.ZipInfo) -> "_Rows | NDArray":
    """A stored member as rows; one in another order of axes than numpy's usual is read whole."""
    start = stored_at(blob, entry.header_offset)
    shape, fortran, dtype, size = npy_header(blob.read(start, min(entry.file_size, 1 << 12)))
    if fortran or dtype.hasobject or not shape:
        return load_npy(io.BytesIO(blob.read(start, entry.file_size)))
    if size + int(np.prod(shape)) * dtype.itemsize != entry.file_size:
        raise ValueError(f"arr_0 of shape {list(shape)} has {entry.file_size} bytes")
    return _Rows(blob, start + size, shape, dtype)


def _array(archive: zipfile.ZipFile, name: str) -> NDArray:
    return load_npy(io.BytesIO(archive.read(name)))


def _listed(names: list[str]) -> str:
    return ", ".join(n.removesuffix(".npy") for n in names[:8]) or "none"


def holds_images(path: str) -> bool:
    """Whether an .npz is a set of images and no statistics; ADM's reference, which is both, counts as statistics."""
    try:
        with open_blob(path).stream() as stream, zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except (InputError, RunError, zipfile.BadZipFile):
        return False
    return IMAGES in names and "mu.npy" not in names
