"""From the members of an archive or the files of a directory to the images among them: which belong together, what
their labels and captions are.

Members of one name but for their ending are one sample, as webdataset and img2dataset write them: `x.jpg`, `x.txt`,
`x.json`, `x.cls`.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

from ldt.data.images.labels_file import LABELS
from ldt.data.images.listed import IMG2DATASET, SINGLE_CLASS, VALUE
from ldt.data.images.listing import Listing, NameList, Table, numbers_of
from ldt.data.images.names import HEAD, METADATA, SUFFIXES, begins_like_an_image, is_hidden, stem
from ldt.errors import InputError
from ldt.files import parse_json

TEXT, JSON_VALUE = 0, 1  # forms of a caption
IMAGE = "/"  # stands for the ending of an image without one: no name holds it
MOST_KEYS = 50  # of .json members that a message lists
Read = Callable[[int], bytes]
"""The content of a member, or its first bytes where a positive number of them is asked for."""


@dataclass(frozen=True)
class Fields:
    """Where labels and captions come from: a member's ending, or a key of a `.json` member; empty for what is usual:
    `.cls`, else the directory, and `.txt`."""

    label: str = ""
    caption: str = ""

    @property
    def label_ending(self) -> str:
        return f".{self.label.lstrip('.').lower()}" if self.label else ".cls"

    @property
    def caption_ending(self) -> str:
        return f".{self.caption.lstrip('.').lower()}" if self.caption else ".txt"


USUAL = Fields()


def texts_of(value: object) -> list[str]:
    """The captions in a JSON value or a column: a text, or several in a list, of which empty ones count for nothing."""
    if isinstance(value, list):
        return [text for text in value if isinstance(text, str) and text.strip()]
    return [value] if isinstance(value, str) else []


def label_of(value: object, where: str, key: str) -> str:
    """A label as a text: a whole number or a name; empty where there is none."""
    if value is None:
        return ""
    if not isinstance(value, int | str):
        raise InputError(f"{where} has {value!r} as {key}; a whole number or a name is expected")
    return str(value).strip()


class Members:
    """What is in an archive or a directory, in arrays."""

    def __init__(self, where: str, fields: Fields) -> None:
        self.where, self.fields = where, fields
        self._names = NameList()
        self._labels, self._label_n = {"": 0}, array("i")
        self._offsets, self._sizes, self._stored, self._captioned = array("q"), array("q"), array("q"), array("b")
        self.left_out: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.json_keys: dict[str, None] = {}
        self.labels_file: list[int] = []
        self.unread: list[str] = []
        self.no_directories = False

    def add(self, name: str, offset: int, size: int, stored: int, read: Read) -> None:
        """Add a member. `read` returns its content and is called right away, if a label or caption may be in it."""
        if is_hidden(name):
            self.left_out["hidden"] += 1
            return
        key, written = self.split(name)
        if not written and begins_like_an_image(read(HEAD)):
            written = IMAGE
        ending = written.lower()
        self.endings[ending] += 1
        if name == LABELS:
            self.labels_file = [offset, size, stored]
            return
        if IMG2DATASET.fullmatch(name):  # its directories are shards, no classes
            self.no_directories = True
            return
        if name.rpartition("/")[2] in METADATA:
            self.unread.append(name)
            return
        label, captioned = self._look_into(name, ending, read)
        self._names.append(f"{key}\0{written}")
        self._label_n.append(self._labels.setdefault(label, len(self._labels)))
        self._offsets.append(offset)
        self._sizes.append(size)
        self._stored.append(stored)
        self._captioned.append(captioned)

    def split(self, name: str) -> tuple[str, str]:
        """The name of the sample, and the ending as it is written: asked for, it may have several dots."""
        for ending in (self.fields.caption_ending, self.fields.label_ending):
            key = name[: -len(ending)]
            if name.lower().endswith(ending) and key and not key.endswith("/"):
                return key, name[-len(ending) :]
        return stem(name), name[len(stem(name)) :]

    def _look_into(self, name: str, ending: str, read: Read) -> tuple[str, bool]:
        """The label that a member holds, and whether it holds a caption."""
        captioned = ending == self.fields.caption_ending
        if ending == self.fields.label_ending:
            try:
                return read(-1).decode().strip(), captioned
            except UnicodeDecodeError:
                raise InputError(f"label {self.where}/{name} is not text; write it again") from None
        if ending != ".json" or not (self.fields.label or self.fields.caption):
            return "", captioned
        try:
            facts = parse_json(read(-1))
        except ValueError:
            raise InputError(f"{self.where}/{name} is not readable as JSON; write it again") from None
        if not isinstance(facts, dict):
            raise InputError(f"{self.where}/{name} holds no keys; write it again") from None
        if len(self.json_keys) < MOST_KEYS:
            self.json_keys |= dict.fromkeys(facts)
        value = facts.get(self.fields.label) if self.fields.label else None
        label = label_of(value, f"{self.where}/{name}", self.fields.label)
        text = facts.get(self.fields.caption) if self.fields.caption else None
        return label, bool(texts_of(text))

    def table(self) -> Table:
        """The images among them, sorted by name."""
        by_value = self._labels_by_value()
        listing, labels = Listing(), list(self._labels)
        listing.left_out = self.left_out
        tops: dict[str, bool] = {}
        for key, parts in self._samples():
            images = [ending for ending in parts if ending.lower() in SUFFIXES or ending == IMAGE]
            top, inside, _ = key.partition("/")
            inside = "" if self.no_directories else inside
            if inside:
                tops[top] = tops.get(top, False) or bool(images)
            if not images:
                for ending in parts:
                    if key + ending != "classes.txt":
                        listing.left_out[ending.lower() or "without an ending"] += 1
                continue
            label = self._label_of(key, parts, labels) if by_value else top if inside else SINGLE_CLASS
            caption = self._caption_of(parts)
            for ending in images:
                i = parts[ending]
                place = self._sizes[i], self._offsets[i], self._stored[i]
                listing.add(key + ending.rstrip(IMAGE), label, *place, caption)
        listing.barren = [top for top, has_image in tops.items() if not has_image]
        table = listing.table().sorted()
        table.facts = {"labels": VALUE if by_value else "", LABELS: self.labels_file, "unread": self.unread[:5]}
        table.facts |= {"endings": self._endings(), "keys": list(self.json_keys)}
        return table

    def _endings(self) -> list[str]:
        return sorted(e for e in self.endings if e not in ("", IMAGE))

    def _samples(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Each sample's name, and its members by their endings, in the order of the names."""
        names = self._names.names()
        split = ((i, names[i].partition("\0")) for i in numbers_of(names.order()))
        for key, group in groupby(split, key=lambda member: member[1][0]):
            parts: dict[str, int] = {}
            for i, (_, _, ending) in group:
                if ending in parts:
                    raise InputError(f"{self.where} has {key}{ending.rstrip(IMAGE)} twice; make it again")
                parts[ending] = i
            yield key, parts

    def _labels_by_value(self) -> bool:
        if self.endings[self.fields.label_ending]:
            return True
        if self.fields.label and self.fields.label not in self.json_keys and len(self._names):
            keys = list(self.json_keys)
            raise InputError(no_field(self.where, "images.label", self.fields.label, self._endings(), keys))
        return bool(self.fields.label)

    def _label_of(self, key: str, parts: dict[str, int], labels: list[str]) -> str:
        wanted = (self.fields.label_ending, *([".json"] if self.fields.label else []))
        found = (labels[self._label_n[i]] for ending, i in parts.items() if ending.lower() in wanted)
        label = next((label for label in found if label), "")
        if not label:
            raise InputError(
                f"{self.where}: image {key} has no label ({self.fields.label or 'cls'}), and others have; add it, or "
                "leave it out"
            )
        return label

    def _caption_of(self, parts: dict[str, int]) -> tuple[int, int, int]:
        """Offset, size and form of the caption of a sample; deflated ones are of the form stored·2 + form."""
        for wanted, form in ((self.fields.caption_ending, TEXT), (".json", JSON_VALUE)):
            for ending, i in parts.items():
                if ending.lower() == wanted and self._captioned[i]:
                    return self._offsets[i], self._sizes[i], form + 2 * (self._stored[i] + 1)
        return -1, 0, 0


def check_captions(table: Table, where: str, fields: Fields) -> None:
    """Refuse a name of captions that no image has; where some have none, that is counted and said."""
    if fields.caption and len(table) and not (table.numbers["caption_offset"] >= 0).any():
        endings, keys = table.facts["endings"], table.facts["keys"]
        raise InputError(no_field(where, "images.caption", fields.caption, endings, keys))


def captions_in(content: bytes, key: str, image: str) -> list[bytes]:
    """The captions under a key of a .json member."""
    try:
        return [text.encode() for text in texts_of(parse_json(content)[key])]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"the .json beside {image} has no readable {key}; write it again") from None


def no_field(where: str, key: str, name: str, endings: list[str], keys: list[str]) -> str:
    """The message about a label or caption by a name that is not there: it lists those that are."""
    more = f", keys in .json: {', '.join(keys)}" if keys else ""
    return f"{where} has no {key}={name}; endings there: {', '.join(endings)}{more}"
