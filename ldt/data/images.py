"""Labelled images from a folder, a tar file or the embedded set, in one sorted order, read one at a time.

A class is a first-level sub-directory, as in torchvision's ImageFolder; images directly under the root form one class
called `images`. A sub-directory without images is no class. Links in a directory are followed, as image sets are often
put together from them. Archives are read in place: nothing is extracted; links and members that point outside are
refused.
"""

import importlib.resources
import io
import os
import tarfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from ldt.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
SINGLE_CLASS = "images"
EMBEDDED = "embedded:fashion_mnist"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class ImageSource(ABC):
    """Images with a class each. `classes` are names in label order; `len` is the number of images."""

    classes: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def label(self, i: int) -> int:
        """Class number of image i."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Where image i comes from, for messages."""

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """Image i, decoded; `InputError` names a file that is not a readable image."""

    def caption(self, i: int) -> str:
        """The caption of image i, empty where it has none."""
        return ""

    def nested(self) -> str:
        """The name of an image that lies deeper than the directory of its class, empty where none does."""
        return ""


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
    if tarfile.is_tarfile(where):
        return ImageTar(where)
    raise InputError(f"image path {path} is neither a directory nor a tar file; give one of these, or {EMBEDDED}")


class _Files(ImageSource):
    """Images named by relative paths `class/…/file`, or `file` for a single class."""

    def __init__(self, where: Path, names: Sequence[str]) -> None:
        self.where = where
        self.names = sorted(n for n in names if PurePosixPath(n).suffix.lower() in SUFFIXES)
        if not self.names:
            archive = next((n for n in sorted(names) if n.lower().endswith((".tar", ".tar.gz", ".tgz", ".zip"))), "")
            if archive:
                raise InputError(
                    f"{where} holds archives such as {archive}, no images; unpack each as its class directory"
                )
            raise InputError(f"{where} holds no images ({', '.join(SUFFIXES)}); put them into a sub-directory a class")
        strays = [n for n in self.names if "/" not in n]
        if 0 < len(strays) < len(self.names):
            raise InputError(
                f"{where} has images both in class directories and outside of them, such as {strays[0]}; move these"
            )
        tops = [self._top(n) for n in self.names]
        self.classes = tuple(sorted(set(tops)))
        number = {c: k for k, c in enumerate(self.classes)}
        self._labels = np.array([number[t] for t in tops], np.int32)

    @staticmethod
    def _top(name: str) -> str:
        top, separator, _ = name.partition("/")
        return top if separator else SINGLE_CLASS

    def __len__(self) -> int:
        return len(self.names)

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def name(self, i: int) -> str:
        return f"{self.where}/{self.names[i]}"

    def nested(self) -> str:
        return next((n for n in self.names if n.count("/") > 1), "")

    def image(self, i: int) -> Image.Image:
        return _decode(self._content(i), self.name(i))

    def caption(self, i: int) -> str:
        """The text file beside the image, of the same name but for `.txt`."""
        name = str(PurePosixPath(self.names[i]).with_suffix(".txt"))
        try:
            return (self._text(name) or b"").decode().strip()
        except UnicodeDecodeError:
            raise InputError(f"caption {self.where}/{name} is not UTF-8 text; write it again") from None

    @abstractmethod
    def _content(self, i: int) -> bytes:
        """The bytes of file i."""

    @abstractmethod
    def _text(self, name: str) -> bytes | None:
        """The bytes of another file, None where it is not there."""


class ImageFolder(_Files):
    """Images below a directory."""

    def __init__(self, where: Path) -> None:
        super().__init__(where, list(_files_below(where, "", frozenset())))

    def _content(self, i: int) -> bytes:
        try:
            return (self.where / self.names[i]).read_bytes()
        except OSError as error:
            raise InputError(f"image {self.name(i)} can't be read: {error.strerror}; check the file") from None

    def _text(self, name: str) -> bytes | None:
        try:
            return (self.where / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"caption {self.where}/{name} can't be read: {error.strerror}; check the file") from None


class ImageTar(_Files):
    """Images in a tar file, read by their offsets."""

    def __init__(self, where: Path) -> None:
        self._members: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(where, "r:") as archive:
                for member in archive:
                    self._add(where, member)
                self._check_end(where, archive.offset)
        except tarfile.TarError as error:
            raise InputError(f"{where} is not a whole, uncompressed tar file ({error}); make it again") from None
        super().__init__(where, list(self._members))
        self._fd = os.open(where, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)

    def _add(self, where: Path, member: tarfile.TarInfo) -> None:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{where} has a member outside of the archive, {member.name}; make it with relative names")
        if member.issym() or member.islnk():
            raise InputError(
                f"{where} has a link, {member.name}; make it with the files themselves (tar --dereference)"
            )
        if member.isfile():
            self._members[path.as_posix()] = (member.offset_data, member.size)

    @staticmethod
    def _check_end(where: Path, offset: int) -> None:
        """A tar ends with blocks of zeros; where a header is cut or damaged, `tarfile` just stops there, silently."""
        with where.open("rb") as f:
            f.seek(offset)
            block = f.read(tarfile.BLOCKSIZE)
        if block != bytes(tarfile.BLOCKSIZE):
            raise InputError(f"{where} is cut or damaged at byte {offset}; make the tar file again")

    def _content(self, i: int) -> bytes:
        return self._member(self.names[i])

    def _text(self, name: str) -> bytes | None:
        return self._member(name) if name in self._members else None

    def _member(self, name: str) -> bytes:
        offset, size = self._members[name]
        content = os.pread(self._fd, size, offset)
        if len(content) != size:
            raise InputError(f"{self.where} ends inside of {name}; make the tar file again")
        return content


class FashionMNIST(ImageSource):
    """The 10,000 test images of Fashion-MNIST, 28 × 28 and grey, 1,000 a class (MIT, (c) 2017 Zalando SE)."""

    side, columns = 28, 100

    def __init__(self) -> None:
        assets = importlib.resources.files("ldt") / "assets" / "fashion_mnist"
        self.classes = tuple((assets / "classes.txt").read_text().split())
        self._labels = np.frombuffer((assets / "labels.bin").read_bytes(), np.uint8)
        with (assets / "images.webp").open("rb") as f:
            self._sheet = np.asarray(Image.open(f).convert("L"))

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def name(self, i: int) -> str:
        return f"{EMBEDDED}/{i}"

    def caption(self, i: int) -> str:
        return self.classes[self.label(i)].replace("_", " ")

    def image(self, i: int) -> Image.Image:
        y, x = (self.side * k for k in divmod(i, self.columns))
        return Image.fromarray(self._sheet[y : y + self.side, x : x + self.side])


def _files_below(directory: Path, prefix: str, above: frozenset[str]) -> Iterator[str]:
    """Names of all files, relative to the root; a link to a directory above it would never end and is an error."""
    real = os.path.realpath(directory)
    if real in above:
        raise InputError(f"{directory} links back to {real}, which holds it; remove the link")
    try:
        entries = list(os.scandir(directory))
    except OSError as error:
        raise InputError(f"directory {directory} can't be read: {error.strerror}; check it") from None
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(directory / entry.name, f"{prefix}{entry.name}/", above | {real})
        else:  # a dangling link stays in the list: reading it names it
            yield prefix + entry.name


def _decode(content: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        deep = _is_deep(image)
        image.load()
    except Exception as error:  # Pillow raises a dozen types over a damaged file
        raise InputError(
            f"image {name} is not readable ({' '.join(str(error).split())}); replace it, and the same command "
            "goes on, or remove it and encode into a new output"
        ) from None
    if deep:
        raise InputError(f"image {name} has more than 8 bits a channel; convert it to 8 bits")
    if image.mode not in MODES:
        raise InputError(f"image {name} has the colour mode {image.mode}; convert it to 8-bit grey or RGB")
    return image


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether an image that is not loaded yet has more than 8 bits a channel.

    For colour images the mode does not tell: Pillow drops the low bits of a 16-bit PNG or TIFF, and scales a PPM.
    """
    if image.mode[0] in "IF":
        return True
    if image.format == "PPM":
        return any(isinstance(tile[3], tuple) and tile[3][-1] > 255 for tile in image.tile)
    return image.format in ("PNG", "TIFF") and any(";16" in str(tile[3]) for tile in image.tile)


def prepare(image: Image.Image, size: int, channels: int, fit: str) -> NDArray[np.uint8]:
    """An image as the autoencoder takes it: uint8 [size, size, channels], 1 (grey) or 3 (RGB) channels.

    `crop`: ADM's centre crop (Dhariwal and Nichol 2105.05233): halve by box while at least twice the size, then
    bicubic so that the short side is `size`, then the middle. `pad`: centred on black, never resized; it must fit.
    Transparent pixels are laid over white.
    """
    image = _flatten(image).convert({1: "L", 3: "RGB"}[channels])
    image = _centre_crop(image, size) if fit == "crop" else _pad(image, size)
    return np.asarray(image, np.uint8).reshape(size, size, channels)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _pad(image: Image.Image, size: int) -> Image.Image:
    if max(image.size) > size:
        raise InputError(
            f"an image of {image.width}x{image.height} does not fit into {size}x{size}; use images.fit=crop"
        )
    canvas = Image.new(image.mode, (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas
