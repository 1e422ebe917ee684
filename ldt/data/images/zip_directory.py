"""The directory at the end of a zip file, read entry by entry: `zipfile` keeps an object of each (APPNOTE 4.3)."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ldt.data.images.blobs import Blob

END = struct.Struct("<4s4H2LH")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")
ENTRY = struct.Struct("<4s6H3L5H2L")
COMMENT = (1 << 16) - 1  # bytes of the longest comment that may follow
UTF8 = 1 << 11


class ZipEntry(NamedTuple):
    """A member: `compressed` bytes at the local header at `offset`. mode: Unix permissions and kind, 0 if unknown."""

    name: str
    flags: int
    method: int
    compressed: int
    size: int
    offset: int
    mode: int


def entries(blob: Blob) -> Iterator[ZipEntry]:
    """The members of a zip file in the order of its directory; ValueError or struct.error for what is none.

    Tools on Windows have written `\\` between directories.
    """
    start, size, count, before = _find(blob)
    stream = blob.stream()
    stream.seek(start)
    end, found = start + size, 0
    while stream.tell() < end:
        signature, *fields = ENTRY.unpack(stream.read(ENTRY.size))
        if signature != b"PK\1\2":
            raise ValueError("its directory is damaged")
        _, _, flags, method, _, _, _, compressed, length, named, extra, comment, _, _, mode, offset = fields
        name, more = stream.read(named), stream.read(extra)
        stream.seek(comment, 1)
        length, compressed, offset = _large(more, length, compressed, offset)
        text = name.decode("utf-8" if flags & UTF8 else "cp437").partition("\0")[0].replace("\\", "/")
        yield ZipEntry(text, flags, method, compressed, length, offset + before, mode >> 16)
        found += 1
    if (found - count) % 65536 or stream.tell() != end:  # old tools count no further
        raise ValueError(f"its directory has {found:,} of {count:,} members")


def _find(blob: Blob) -> tuple[int, int, int, int]:
    """Where the directory begins, its bytes and members, and how many bytes lie before the archive itself."""
    tail = min(blob.size, END.size + COMMENT)
    content = blob.read(blob.size - tail, tail)
    at = content.rfind(b"PK\5\6", 0, len(content) - END.size + 4)
    if at < 0:
        raise ValueError("it has no directory at its end")
    _, disk, _, _, count, size, offset, _ = END.unpack_from(content, at)
    end = blob.size - tail + at
    locator = end - LOCATOR_64.size
    if locator >= 0 and blob.read(locator, 4) == b"PK\6\7":
        _, _, large, _ = LOCATOR_64.unpack(blob.read(locator, LOCATOR_64.size))
        end = locator - END_64.size
        signature, *_, disk, _, _, count, size, offset = END_64.unpack(blob.read(end, END_64.size))
        if signature != b"PK\6\6":
            raise ValueError(f"there is no directory at byte {large:,}")
    before = end - size - offset  # as in archives behind a program that unpacks them
    if disk or before < 0:
        raise ValueError("its directory does not fit its size")
    return offset + before, size, count, before


def _large(extra: bytes, *values: int) -> tuple[int, ...]:
    """Values of 32 bits, or of 64 where those are full."""
    out, at, large = list(values), 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            large = extra[at + 4 : at + 4 + length]
        at += 4 + length
    for k, value in enumerate(values):
        if value == 0xFFFFFFFF:
            (out[k],) = struct.unpack_from("<Q", large)
            large = large[8:]
    return tuple(out)
