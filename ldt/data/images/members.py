"""From the members of an archive to the images in it: which belong together, what their labels and captions are.

Members of one name but for their ending are one sample, as webdataset and img2dataset write them: `x.jpg`, `x.txt`,
`x.json`, `x.cls`.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ldt.data.images.listed import IMG2DATASET, LABELS, SINGLE_CLASS, VALUE
from ldt.data.images.listing import Listing, Names, Table
from ldt.data.images.names import HEAD, SUFFIXES, begins_like_an_image, is_hidden, stem, suffix
from ldt.errors import InputError

TEXT, JSON_VALUE = 0, 1  # forms of a caption


@dataclass(frozen=True)
class Fields:
    """Where labels and captions come from: a member's ending, or a key of a `.json` member; empty for what is usual:
    `.cls`, else the directory, and `.txt`."""

    label: str = ""
    caption: str = ""

    @property
    def label_ending(self) -> str:
        return f".{self.label.lstrip('.')}" if self.label else ".cls"

    @property
    def caption_ending(self) -> str:
        return f".{self.caption.lstrip('.')}" if self.caption else ".txt"


USUAL = Fields()


def texts_of(value: object) -> list[str]:
    """The captions in a JSON value or a column: a text, or several in a list, of which empty ones count for nothing."""
    if isinstance(value, list):
        return [text for text in value if isinstance(text, str) and text.strip()]
    return [value] if isinstance(value, str) else []


class Members:
    """What is in an archive, in arrays."""

    def __init__(self, where: str, fields: Fields) -> None:
        self.where, self.fields = where, fields
        self._names, self._ends, self._labels, self._label_ends = bytearray(), array("q"), bytearray(), array("q")
        self._numbers = array("q")  # offset, size, stored, and 1 if a caption is in it, of each
        self.left_out: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.json_keys: list[str] = []
        self.labels_file: list[int] = []
        self.no_directories = False

    def add(self, name: str, offset: int, size: int, stored: int, read: Callable[[], bytes]) -> None:
        """Add a member. `read` returns its content and is called right away, if a label or caption may be in it."""
        if is_hidden(name):
            self.left_out["hidden"] += 1
            return
        ending = suffix(name)
        if not ending and begins_like_an_image(read()[:HEAD]):
            ending = "/"  # no name has one
        self.endings[ending] += 1
        if name == LABELS:
            self.labels_file = [offset, size, stored]
            return
        if IMG2DATASET.fullmatch(name):  # its directories are shards, no classes
            self.no_directories = True
            return
        label, captioned = self._look_into(name, ending, read)
        written = "/" if ending == "/" else name[len(stem(name)) :]
        self._names += f"{stem(name)}\0{written}".encode("utf-8", "surrogateescape")
        self._ends.append(len(self._names))
        self._labels += label.encode()
        self._label_ends.append(len(self._labels))
        self._numbers.extend((offset, size, stored, int(captioned)))

    def _look_into(self, name: str, ending: str, read: Callable[[], bytes]) -> tuple[str, bool]:
        """The label that a member holds, and whether it holds a caption."""
        captioned = ending == self.fields.caption_ending
        if ending == self.fields.label_ending:
            try:
                return read().decode().strip(), captioned
            except UnicodeDecodeError:
                raise InputError(f"label {self.where}/{name} is not text; write it again") from None
        if ending != ".json" or not (self.fields.label or self.fields.caption):
            return "", captioned
        try:
            facts = json.loads(read())
        except (ValueError, RecursionError):
            raise InputError(f"{self.where}/{name} is not readable as JSON; write it again") from None
        if not isinstance(facts, dict):
            raise InputError(f"{self.where}/{name} holds no keys; write it again") from None
        self.json_keys = self.json_keys or [*facts]
        label = facts.get(self.fields.label) if self.fields.label else None
        text = facts.get(self.fields.caption) if self.fields.caption else None
        if label is not None and not isinstance(label, int | str):
            raise InputError(
                f"{self.where}/{name} has {label!r} as {self.fields.label}; a number or a name is expected"
            )
        return "" if label is None else str(label).strip(), bool(texts_of(text))

    def table(self) -> Table:
        """The images among them, sorted by name."""
        names = Names(bytes(self._names), np.array(self._ends, np.int64))
        label_names = Names(bytes(self._labels), np.array(self._label_ends, np.int64))
        numbers = np.array(self._numbers, np.int64).reshape(-1, 4)
        by_value = self._labels_by_value()
        listing = Listing()
        listing.left_out = self.left_out
        tops: dict[str, bool] = {}
        order = names.order().tolist()
        for key, group in groupby(order, key=lambda i: names[i].partition("\0")[0]):
            parts: dict[str, int] = {}
            for i in group:
                ending = names[i].partition("\0")[2]
                if ending in parts:
                    raise InputError(f"{self.where} has {key}{ending.rstrip('/')} twice; make it again")
                parts[ending] = i
            images = [ending for ending in parts if ending.lower() in SUFFIXES or ending == "/"]
            top, inside, _ = key.partition("/")
            inside = "" if self.no_directories else inside
            if inside:
                tops[top] = tops.get(top, False) or bool(images)
            if not images:
                for ending in parts:
                    if key + ending != "classes.txt":
                        listing.left_out[ending.lower() or "without an ending"] += 1
                continue
            label = self._label_of(key, parts, label_names) if by_value else top if inside else SINGLE_CLASS
            caption = self._caption_of(parts, numbers)
            for ending in images:
                offset, size, stored, _ = numbers[parts[ending]].tolist()
                listing.add(key + ending.rstrip("/"), label, size, offset, stored, caption)
        listing.barren = [top for top, has_image in tops.items() if not has_image]
        table = listing.table().sorted()
        table.facts = {"labels": VALUE if by_value else "", LABELS: self.labels_file}
        if self.fields.caption and not (table.numbers["caption_offset"] >= 0).any():
            raise InputError(self._no_field("images.caption", self.fields.caption))
        return table

    def _labels_by_value(self) -> bool:
        if self.endings[self.fields.label_ending]:
            return True
        if self.fields.label and self.fields.label not in self.json_keys and len(self._ends):
            raise InputError(self._no_field("images.label", self.fields.label))
        return bool(self.fields.label)

    def _no_field(self, key: str, name: str) -> str:
        endings = ", ".join(sorted(e for e in self.endings if e not in ("", "/")))
        keys = f", keys in .json: {', '.join(self.json_keys)}" if self.json_keys else ""
        return f"{self.where} has no {key}={name}; endings there: {endings}{keys}"

    def _label_of(self, key: str, parts: dict[str, int], labels: Names) -> str:
        at = parts.get(self.fields.label_ending, parts.get(".json") if self.fields.label else None)
        label = labels[at] if at is not None else ""
        if not label:
            wanted = self.fields.label or "cls"
            raise InputError(
                f"{self.where}: image {key} has no label ({wanted}), and others have; add it, or leave it out"
            )
        return label

    def _caption_of(self, parts: dict[str, int], numbers: np.ndarray) -> tuple[int, int, int]:
        """Offset, size and form of the caption of a sample; deflated ones are of the form stored·2 + form."""
        for ending, form in ((self.fields.caption_ending, TEXT), (".json", JSON_VALUE)):
            at = parts.get(ending)
            if at is not None and numbers[at, 3]:
                offset, size, stored, _ = numbers[at].tolist()
                return offset, size, form + 2 * (stored + 1)
        return -1, 0, 0
