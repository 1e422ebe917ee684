"""Hugging Face's imagefolder: `metadata.jsonl` or `metadata.csv` names each image's label and caption.

Rows are read one by one into arrays, twice: at first to know the columns.
"""

import csv
import io
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from ldt.data.images.listed import VALUE
from ldt.data.images.listing import NameList, Names, Table
from ldt.data.images.members import Fields, label_of, texts_of
from ldt.data.images.names import CAPTION_COLUMNS
from ldt.data.images.tree import Tree
from ldt.errors import InputError
from ldt.files import parse_json

SEPARATOR = "\0"  # of several captions of an image


def described(tree: Tree, file: str, table: Table, fields: Fields) -> tuple[Table, Names]:
    """The images of a table that a metadata file names, with its labels, and, where it has captions, those of each."""
    where = f"{tree.where}/{file}"
    columns, rows = _columns(tree, file)
    for key, column in (("images.label", fields.label), ("images.caption", fields.caption)):
        if column and column not in columns:
            raise InputError(f"{where} has no {key}={column}; columns there: {', '.join(columns)}")
    if not rows:
        raise InputError(f"{where} names no images; write a row for each, or remove it")
    label = fields.label or ("label" if "label" in columns else "")
    caption = fields.caption or next((c for c in CAPTION_COLUMNS if c in columns), "")
    listed, texts, classes, label_n = NameList(), NameList(), dict[str, int](), array("i")
    for number, row in enumerate(_rows(tree, file), 1):
        listed.append(row["file_name"])
        if label:
            value = label_of(row.get(label), f"{where}: row {number}", label)
            if not value:
                raise InputError(f"{where} has no {label} for {row['file_name']}; add it")
            label_n.append(classes.setdefault(value, len(classes)))
        texts.append(SEPARATOR.join(texts_of(row.get(caption) if caption else None)))
    names = listed.names()
    row_n = names.positions(table.names)
    _check_rows(tree, where, names, table.names)
    if (row_n < 0).any():
        table.left_out[f"images that {file} does not name"] = int((row_n < 0).sum())
        table = table.take(np.flatnonzero(row_n >= 0))
        row_n = row_n[row_n >= 0]
    if label:
        order = sorted(classes)
        place = {name: i for i, name in enumerate(order)}
        rank = np.array([place[name] for name in classes], np.int32)
        table.classes, table.label_n, table.facts = order, rank[np.array(label_n)[row_n]], {"labels": VALUE}
    if not caption:
        return table, Names(b"", row_n[:0])
    captions = texts.names().take(row_n)
    table.numbers["caption_offset"] = np.where(np.diff(captions.end_n, prepend=0) > 0, 0, -1)
    return table, captions


def _check_rows(tree: Tree, where: str, names: Names, images: Names) -> None:
    twice = names.repeated()
    if len(twice):
        raise InputError(
            f"{where} names {names[int(twice[0])]} twice; write one row, with several captions as a list in it"
        )
    missing_n = np.flatnonzero(images.positions(names) < 0)
    if len(missing_n):
        name = names[int(missing_n[0])]
        why = "no image by its ending" if tree.holds(name) else "not there"
        raise InputError(f"{where} names {name}, which is {why}; restore it, or remove its line")


def _columns(tree: Tree, file: str) -> tuple[list[str], int]:
    """The columns besides `file_name`, and how many rows there are."""
    found: dict[str, None] = {}
    rows = 0
    for row in _rows(tree, file):
        found |= dict.fromkeys(row)
        rows += 1
    return [c for c in found if c not in ("file_name", None)], rows


def _rows(tree: Tree, file: str) -> Iterator[dict[str, Any]]:
    """The rows of a metadata file, each with a `file_name` that is a path in its directory."""
    where = f"{tree.where}/{file}"
    is_csv = file.endswith(".csv")
    with tree.open(file) as content:
        text = io.TextIOWrapper(content, "utf-8-sig", newline="" if is_csv else None)
        lines: Iterator[Any] = csv.DictReader(text) if is_csv else (line for line in text if line.strip())
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                row = line if isinstance(line, dict) else parse_json(line)
                if not isinstance(row["file_name"], str):
                    raise TypeError
                yield row | {"file_name": _inside(row["file_name"], f"{where}: row {number}")}
        except UnicodeDecodeError:
            raise InputError(f"{where} is not UTF-8 text; write it again") from None
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{where}: row {number} has no readable file_name; write it again") from None


def _inside(name: str, row: str) -> str:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise InputError(f"{row} names {name}, which is outside of its directory")
    return "/".join(part for part in parts if part not in (".", ""))
