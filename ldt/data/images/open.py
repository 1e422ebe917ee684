"""The images at a path."""

import tarfile
from pathlib import Path

from ldt.data.images.embedded import EMBEDDED, FashionMNIST
from ldt.data.images.files import ImageFolder, ImageTar
from ldt.data.images.source import ImageSource
from ldt.errors import InputError, file_error


def open_images(path: str) -> ImageSource:
    """The images at a path: a directory, a .tar file, or `embedded:fashion_mnist`."""
    if path == EMBEDDED:
        return FashionMNIST()
    if path.startswith("embedded:"):
        raise InputError(f"there is no embedded image set {path}; the only one is {EMBEDDED}")
    where = Path(path)
    if not where.exists():
        raise InputError(f"image path {path} does not exist; give a directory of images, a .tar file or {EMBEDDED}")
    if where.is_dir():
        return ImageFolder(where)
    try:
        if tarfile.is_tarfile(where):
            return ImageTar(where)
    except OSError as error:
        raise file_error(f"image path {path}", error, "check it") from None
    raise InputError(f"image path {path} is neither a directory nor a tar file; give one of these, or {EMBEDDED}")
