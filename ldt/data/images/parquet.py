"""Images in parquet files: a column of Hugging Face's `image` ({bytes, path}) or of bytes, and columns beside it."""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ldt.data.images.blobs import Blob
from ldt.data.images.listed import SINGLE_CLASS, VALUE, ListedImages
from ldt.data.images.listing import Listing, Table
from ldt.data.images.members import Fields, texts_of
from ldt.data.images.names import CAPTION_COLUMNS
from ldt.errors import InputError, by_reason

KEPT = 1 << 30  # bytes of row groups that are in memory at a time, if there is more than one
LARGEST = "bytes of the largest row group"
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")


def pyarrow() -> ModuleType:
    """pyarrow's parquet module."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("parquet files need pyarrow; pip install ldt-train[parquet]") from None
    module: ModuleType = pyarrow.parquet
    return module


def open_file(blob: Blob) -> Any:
    """pyarrow's reader of a parquet file."""
    try:
        return pyarrow().ParquetFile(blob.stream())
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        if isinstance(error, InputError):
            raise
        raise by_reason(f"{blob.name} is not a whole parquet file ({_line(error)}); make it again", error) from None


def index_parquet(blob: Blob, fields: Fields) -> Table:
    """The rows of a parquet file that are images; of their bytes nothing is read."""
    file = open_file(blob)
    columns = {field.name: str(field.type) for field in file.schema_arrow}
    image = image_column(blob, columns)
    for key, name in (("images.label", fields.label), ("images.caption", fields.caption)):
        if name and name not in columns:
            raise InputError(f"{blob.name} has no {key}={name}; columns there: {', '.join(columns)}")
    label = fields.label or ("label" if "label" in columns else "")
    caption = fields.caption or next((c for c in CAPTION_COLUMNS if c in columns), "")
    names = class_names_in(file, label)
    listing, row = Listing(), 0
    for group in range(file.num_row_groups):
        labels = _column(file, blob, group, label) if label else None
        captions = _column(file, blob, group, caption) if caption else None
        for k in range(file.metadata.row_group(group).num_rows):
            value = SINGLE_CLASS if labels is None else labels[k]
            if value is None or not isinstance(value, int | str):
                raise InputError(f"{blob.name}: row {row} has {value!r} as {label}; a number or a name is expected")
            if names and isinstance(value, int) and not 0 <= value < len(names):
                raise InputError(f"{blob.name}: row {row} has the label {value}, and its classes are {len(names)}")
            text = captions[k] if captions is not None else None
            size = len(str(text).encode()) if text is not None else 0
            place = (group, size, k) if texts_of(text) else (-1, 0, 0)
            listing.add(f"{row:09d}", str(value).strip(), blob.size, group, k, place)
            row += 1
    table = listing.table()
    table.facts = {"labels": VALUE if label else "", "image": image, "caption": caption, "names": names}
    table.facts |= {"others": [c for c in binary_columns(columns) if c != image], LARGEST: _largest(file, image)}
    return table


def binary_columns(columns: dict[str, str]) -> list[str]:
    """The columns that may hold images: bytes, or Hugging Face's struct around them."""
    return [c for c, kind in columns.items() if kind in ("binary", "large_binary") or "bytes: binary" in kind]


def _largest(file: Any, column: str) -> int:
    """Bytes of the images in the largest row group."""
    groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
    return max((_size(group, column) for group in groups), default=0)


def _size(group: Any, column: str) -> int:
    parts = (group.column(c) for c in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in parts if c.path_in_schema.split(".")[0] == column)


def image_column(blob: Blob, columns: dict[str, str]) -> str:
    """The column that holds image bytes."""
    binary = binary_columns(columns)
    usual = [c for c in IMAGES if c in binary] or [c for c in binary if columns[c].startswith("struct")] or binary
    if not usual:
        raise InputError(
            f"{blob.name} has no column of image bytes (Hugging Face's image or binary); columns there: "
            f"{', '.join(f'{c} ({kind})' for c, kind in columns.items())}"
        )
    return usual[0]


def class_names_in(file: Any, label: str) -> list[str]:
    """The names of a column's classes, as Hugging Face's datasets write them into the schema."""
    try:
        features = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names]


class ParquetImages(ListedImages):
    """Images in rows of parquet files. A few row groups are kept: neighbours are asked for one after another."""

    def __init__(self, where: str, blobs: Sequence[Blob], table: Table, beside: str) -> None:
        self._blobs = blobs
        self._files: dict[int, Any] = {}
        self._groups: OrderedDict[tuple[int, int, str], Any] = OrderedDict()
        self._lock = threading.Lock()
        super().__init__(where, table, beside)

    def _name_numbers(self, largest: int) -> None:
        names = self.table.facts["names"]
        if names:
            self.classes = tuple(names)
        else:
            super()._name_numbers(largest)

    def remarks(self) -> list[str]:
        """Also says which of several columns the images are, and when row groups take much memory."""
        facts, out = self.table.facts, super().remarks()
        if facts["others"]:
            out.append(f"images are the column {facts['image']}; {', '.join(facts['others'])} may hold some too")
        if facts[LARGEST] > KEPT:
            out.append(
                f"a row group holds {facts[LARGEST] / 1e9:.1f} GB of images, which are read at once; write the files "
                "again with row_group_size=1000 to save memory"
            )
        return out

    def name(self, i: int) -> str:
        return f"row {int(self.names[i])} of {self._blobs[self._file(i)].name}"

    def key(self, i: int) -> str:
        return f"{self._file(i)} {self.names[i]}"

    def content(self, i: int) -> bytes:
        n = self.table.numbers
        value = self._values(self._file(i), int(n["offset"][i]), self.table.facts["image"])[int(n["stored"][i])].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise InputError(
                f"image {self.name(i)} has no bytes, perhaps only a path; write it with the images embedded"
            )
        return value

    def _captions(self, i: int) -> list[bytes]:
        n = self.table.numbers
        group, row = int(n["caption_offset"][i]), int(n["caption_form"][i])
        value = self._values(self._file(i), group, self.table.facts["caption"])[row].as_py()
        return [text.encode() for text in texts_of(value)]

    def _file(self, i: int) -> int:
        return int(self.table.numbers["part"][i])

    def _values(self, file: int, group: int, column: str) -> Any:
        """A column of a row group."""
        with self._lock:
            key = (file, group, column)
            if key not in self._groups:
                if file not in self._files:
                    self._files = {file: open_file(self._blobs[file])}
                read = _read_group(self._files[file], self._blobs[file], group, column)
                self._groups[key] = read
                while len(self._groups) > 1 and sum(g.nbytes for g in self._groups.values()) > KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]


def _read_group(file: Any, blob: Blob, group: int, column: str) -> Any:
    try:
        return file.read_row_group(group, columns=[column], use_threads=False).column(column)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise by_reason(f"{blob.name} is damaged in row group {group} ({_line(error)}); make it again", error) from None


def _column(file: Any, blob: Blob, group: int, name: str) -> list[Any]:
    return list(_read_group(file, blob, group, name).to_pylist())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
