"""Images on disk and on one page: grids, folders of PNGs, .npz files. A file appears under its name only when whole."""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ldt.files import making, replacing

Images = Iterator[NDArray[np.uint8]]
Labels = NDArray[np.int64]
Writer = Callable[[Path, Images, Labels, dict[str, Any]], None]

MOST_ROWS = 16  # up to so many classes have a row each in a grid


def grid(rows: Sequence[NDArray[np.uint8]], gap: int = 2) -> Image.Image:
    """Rows of uint8 images [n, H, W, C] as one picture on white."""
    height, width, channels = rows[0].shape[1:]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image_HWC in enumerate(row):
            y, x = gap + r * (height + gap), gap + c * (width + gap)
            canvas[y : y + height, x : x + width] = image_HWC
    return to_pil(canvas)


def class_grid(image_NHWC: NDArray[np.uint8], label_N: Labels, most_rows: int = MOST_ROWS) -> Image.Image:
    """The images in `class_rows`, as one picture."""
    return grid(class_rows(image_NHWC, label_N, most_rows))


def class_rows(image_NHWC: NDArray[np.uint8], label_N: Labels, most_rows: int = MOST_ROWS) -> list[NDArray[np.uint8]]:
    """One row a class where there are at most `most_rows` classes, else a nearly square layout in id order."""
    present = np.unique(label_N)
    if len(present) <= most_rows:
        return [image_NHWC[label_N == label] for label in present]
    columns = int(np.ceil(np.sqrt(len(image_NHWC))))
    return [image_NHWC[i : i + columns] for i in range(0, len(image_NHWC), columns)]


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other on white."""
    canvas = Image.new(pictures[0].mode, (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas


def titled(picture: Image.Image, titles: Sequence[str], width: int = 200) -> Image.Image:
    """A picture of as many rows of the same height, with a title to the left of each."""
    canvas = Image.new("RGB", (picture.width + width, picture.height), "white")
    canvas.paste(picture, (width, 0))
    draw, row = ImageDraw.Draw(canvas), picture.height / len(titles)
    for i, title in enumerate(titles):
        line = title if len(title) <= 32 else title[:31] + "…"
        draw.text((4, int((i + 0.5) * row) - 6), line, fill="black")
    return canvas


def to_pil(image_HWC: NDArray[np.uint8]) -> Image.Image:
    """uint8 [H, W, 1 or 3] as a grey or colour picture."""
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)


def write_picture(output: Path, picture: Image.Image) -> None:
    """Save a PNG, whole or not at all."""
    with replacing(output) as temporary:
        picture.save(temporary, format="PNG")


def write_cells(output: Path, image_NHWC: NDArray[np.uint8], label_N: Labels, samples_seen: int) -> None:
    """Save the images of a sample grid one by one, with their labels and the clock at which they were drawn."""
    with replacing(output) as temporary, temporary.open("wb") as file:
        np.savez(file, images=image_NHWC, labels=label_N, samples_seen=np.int64(samples_seen))


def read_cells(path: Path) -> tuple[NDArray[np.uint8], Labels, int]:
    """What `write_cells` has written; a damaged file is a ValueError."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as cells:
            image_NHWC, label_N, samples_seen = cells["images"], cells["labels"], int(cells["samples_seen"])
    except OSError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen types over a damaged file
        raise ValueError(f"{path.name} is damaged ({error})") from None
    if image_NHWC.dtype != np.uint8 or image_NHWC.ndim != 4 or label_N.dtype.kind != "i":
        raise ValueError(f"{path.name} holds {image_NHWC.dtype} {image_NHWC.shape}, not images")
    if not len(image_NHWC) or label_N.shape != image_NHWC.shape[:1]:
        raise ValueError(f"{path.name} holds {len(image_NHWC)} images and {label_N.size} labels")
    return image_NHWC, label_N, samples_seen


def write_grid(output: Path, blocks: Images, label_N: Labels, record: dict[str, Any]) -> None:
    """One PNG with `class_grid` of all images, or a row for each of the record's prompts, which stands before it."""
    image_NHWC, prompts = np.concatenate(list(blocks)), record.get("prompts", [])
    if prompts:
        rows = [image_NHWC[i :: len(prompts)] for i in range(min(len(prompts), len(image_NHWC)))]
        write_picture(output, titled(grid(rows), prompts))
    else:
        write_picture(output, class_grid(image_NHWC, label_N))


def write_folder(output: Path, blocks: Images, label_N: Labels, record: dict[str, Any]) -> None:
    """`000000.png`, … by image id, and samples.json with the labels and the record."""
    with making(output) as temporary:
        i = 0
        for block_NHWC in blocks:
            for image_HWC in block_NHWC:
                to_pil(image_HWC).save(temporary / f"{i:06d}.png")
                i += 1
        assert i == len(label_N), (i, len(label_N))
        (temporary / "samples.json").write_text(json.dumps(record | {"labels": label_N.tolist()}) + "\n")


def write_npz(output: Path, blocks: Images, label_N: Labels, record: dict[str, Any]) -> None:
    """arr_0 (uint8 [N, H, W, C]) and arr_1 (labels): the layout of ADM's evaluator (Dhariwal and Nichol 2105.05233)."""
    first, start = next(blocks), 0
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(label_N), *first.shape[1:])}
    with replacing(output) as temporary, zipfile.ZipFile(temporary, "w") as z:
        with z.open("arr_0.npy", "w", force_zip64=True) as f:  # at once: 50,000 images of 256 pixels are 10 GB
            np.lib.format.write_array_header_1_0(f, header)
            for block_NHWC in chain([first], blocks):
                f.write(np.ascontiguousarray(block_NHWC).data)
                start += len(block_NHWC)
        assert start == len(label_N), (start, len(label_N))
        with z.open("arr_1.npy", "w") as f:
            np.lib.format.write_array(f, label_N, allow_pickle=False)


WRITERS: dict[str, Writer] = {"grid": write_grid, "folder": write_folder, "npz": write_npz}
