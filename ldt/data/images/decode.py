"""An image file's bytes → an image → what the autoencoder takes."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from ldt.data.images.bucket_rule import Size
from ldt.errors import InputError, by_reason

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
MODE = {1: "L", 3: "RGB"}
HEADERS = ("JPEG", "MPO", "WEBP", "PNG")
"""Formats whose header says how large the decoded image is. (Others may change it while they decode, as ICO and TIFF.)
All but PNG, where it may follow the pixels, also say there how the image is turned."""


def decode(content: bytes, name: str) -> Image.Image:
    """The image in a file's content; `InputError` says what is wrong with it."""
    try:
        image = Image.open(io.BytesIO(content))
        deep = _is_deep(image, content)
        image.load()
    except Exception as error:  # Pillow raises a dozen types over a damaged file
        raise by_reason(
            f"image {name} is not readable ({_reason(error, content)}); replace it, and the same command goes on, or "
            "remove it (an encoding then needs a new output)",
            error,
        ) from None
    return checked(image, name, deep)


def checked(image: Image.Image, name: str, deep: bool) -> Image.Image:
    """The image, if it is one that can be converted; deep: whether it has more than 8 bits a channel."""
    if deep:
        raise InputError(f"image {name} has more than 8 bits a channel; convert it to 8 bits")
    if image.mode not in MODES:
        raise InputError(f"image {name} has the colour mode {image.mode}; convert it to 8-bit grey or RGB")
    return image


def _reason(error: Exception, content: bytes) -> str:
    if not content:
        return "it has 0 bytes"
    if isinstance(error, UnidentifiedImageError):
        return f"Pillow knows no such format; it begins with {content[:16]!r}"
    return " ".join(str(error).split()) or type(error).__name__


def _is_deep(image: ImageFile.ImageFile, content: bytes) -> bool:
    """Whether an image that is not loaded yet has more than 8 bits a channel.

    For colour images the mode does not tell: Pillow drops the low bits of a 16-bit PNG or TIFF, and scales a PPM, a
    JPEG 2000 and an AVIF, whose headers say it (ISO 15444-1 A.5.1, the AV1 codec configuration box).
    """
    if image.mode[0] in "IF":
        return True
    if image.format == "PPM":
        return any(isinstance(tile[3], tuple) and tile[3][-1] > 255 for tile in image.tile)
    if image.format == "JPEG2000":
        at = content.find(b"\xff\x4f\xff\x51")
        return at >= 0 and any(depth & 127 > 7 for depth in content[at + 42 : at + 42 + 3 * len(image.getbands()) : 3])
    if image.format == "AVIF":
        at = content.find(b"av1C")
        return at >= 0 and content[at + 6] & 64 > 0
    return image.format in ("PNG", "TIFF") and any(";16" in str(tile[3]) for tile in image.tile)


def shape_of(content: bytes, name: str, turn: bool) -> Size:
    """Height and width of the image in a file's content, from its header where that is enough.

    turn: of the image turned as its EXIF says. `InputError` where even this can't be read; a header alone does not show
    that the rest is damaged.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format in HEADERS and not (turn and image.format == "PNG"):
                size = Size(image.height, image.width)
                sideways = turn and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
                return Size(size.width, size.height) if sideways else size
    except Exception:  # Pillow raises a dozen types over a damaged file, which `decode` puts into words
        pass
    whole = decode(content, name)
    whole = upright(whole) if turn else whole
    return Size(whole.height, whole.width)


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF says."""
    turned = ImageOps.exif_transpose(image)
    assert turned is not None  # it is, only where asked to work in place
    return turned


def prepare(image: Image.Image, size: int | tuple[int, int], channels: int, fit: str) -> NDArray[np.uint8]:
    """An image as the autoencoder takes it: uint8 [height, width, channels], 1 (grey) or 3 (RGB) channels.

    size: the side of a square, or (height, width). `crop`: ADM's centre crop (Dhariwal and Nichol 2105.05233): halve by
    box while at least twice the size, then bicubic so that it just covers the size, then the middle. `pad`: centred on
    black, never resized; it must fit. Transparent pixels are laid over white.
    """
    height, width = (size, size) if isinstance(size, int) else size
    image = _flatten(image).convert(MODE[channels])
    image = _centre_crop(image, height, width) if fit == "crop" else _pad(image, height, width)
    return np.asarray(image, np.uint8).reshape(height, width, channels)


def convert(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """An image at its own size: uint8 [H, W, channels]; transparent pixels are laid over white."""
    image = _flatten(image).convert(MODE[channels])
    return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.width > width or image.height > height:
        raise InputError(
            f"an image of {image.width}x{image.height} does not fit into {width}x{height}; use images.fit=crop"
        )
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas
