"""Images in tar and zip files, one or many, read in place: nothing is extracted."""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from ldt.data.images import zip_directory
from ldt.data.images.blobs import AHEAD, Blob
from ldt.data.images.labels_file import LABELS
from ldt.data.images.listed import ListedImages
from ldt.data.images.listing import Ints, Table
from ldt.data.images.members import JSON_VALUE, Fields, Members, Read, captions_in
from ldt.errors import InputError

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a member of a zip file, APPNOTE 4.3.7


def index_tar(blob: Blob, fields: Fields) -> Table:
    """The images in a tar file, by one pass over it."""
    members, seen = Members(blob.name, fields), 0
    try:
        with blob.stream() as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                seen = archive.offset
                if member.issym() or member.islnk():
                    raise InputError(
                        f"{blob.name} has a link, {member.name}; make it with the files themselves (tar --dereference)"
                    )
                if member.offset_data + member.size > blob.size:
                    raise InputError(f"{blob.name} is cut or damaged at byte {blob.size}; make the tar file again")
                if member.isfile():
                    name = relative(blob.name, member.name)
                    read = _reader(blob, member.offset_data, member.size)
                    members.add(name, member.offset_data, member.size, -1, read)
            _check_end(blob, max(seen, archive.offset))
    except tarfile.TarError as error:
        raise InputError(f"{blob.name} is not a whole, uncompressed tar file ({error}); make it again") from None
    return members.table()


def index_zip(blob: Blob, fields: Fields) -> Table:
    """The images in a zip file, by the directory at its end."""
    members = Members(blob.name, fields)
    try:
        for entry in zip_directory.entries(blob):
            if entry.name.endswith("/"):
                continue
            name = relative(blob.name, entry.name)
            if entry.flags & 1 or entry.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(
                    f"{blob.name}: {name} is encrypted or packed otherwise than by deflate; make the zip file again"
                )
            if entry.mode & 0o170000 == 0o120000:
                raise InputError(f"{blob.name} has a link, {name}; make it with the files themselves")
            stored = -1 if entry.method == zipfile.ZIP_STORED else entry.compressed
            members.add(name, entry.offset, entry.size, stored, _zip_reader(blob, entry.offset, entry.size, stored))
    except (ValueError, struct.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{blob.name} is not a whole zip file ({error}); make it again") from None
    return members.table()


def relative(where: str, name: str) -> str:
    """A member's name as a relative path; `InputError` for one that points outside."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise InputError(f"{where} has a member outside of the archive, {name}; make it with relative names")
    return "/".join(p for p in parts if p not in (".", ""))


class ArchiveImages(ListedImages):
    """Images in tar or zip files."""

    def __init__(
        self, where: str, blobs: Sequence[Blob], table: Table, beside: str, zipped: bool, caption: str
    ) -> None:
        self._blobs, self._zipped, self._caption_key = blobs, zipped, caption
        super().__init__(where, table, beside)

    def remarks(self) -> list[str]:
        """Also warns of names that are in several files: the same images may be in the set twice."""
        twice = self.names.repeated() if len(self._blobs) > 1 else np.zeros(0, np.int64)
        if not len(twice):
            return super().remarks()
        return [
            *super().remarks(),
            f"{len(twice):,} names stand in several files, such as {self.names[int(twice[0])]}: is an image there "
            "twice?",
        ]

    def name(self, i: int) -> str:
        return f"{self._blob(i).name}/{self.names[i]}"

    def content(self, i: int) -> bytes:
        n = self.table.numbers
        return self._read(self._blob(i), int(n["offset"][i]), int(n["size"][i]), int(n["stored"][i]))

    def _captions(self, i: int) -> list[bytes]:
        n = self.table.numbers
        stored, form = divmod(int(n["caption_form"][i]), 2)
        content = self._read(self._blob(i), int(n["caption_offset"][i]), int(n["caption_size"][i]), stored - 1)
        return captions_in(content, self._caption_key, self.name(i)) if form == JSON_VALUE else [content]

    def _labels_files(self) -> Iterator[tuple[Ints, bytes, str]]:
        for part, place in enumerate(self.table.facts[LABELS]):
            number_n = np.flatnonzero(self.table.numbers["part"] == part)
            if not len(number_n):
                continue
            blob = self._blobs[part]
            if not place:
                raise InputError(
                    f"{blob.name} has no {LABELS}, and others of {self.where} have; add it, or take it away from those"
                )
            yield number_n, self._read(blob, *place), f"{blob.name}/{LABELS}"

    def _blob(self, i: int) -> Blob:
        return self._blobs[int(self.table.numbers["part"][i])]

    def _read(self, blob: Blob, offset: int, size: int, stored: int) -> bytes:
        return _zip_reader(blob, offset, size, stored)(-1) if self._zipped else blob.read(offset, size)


def _reader(blob: Blob, offset: int, size: int) -> Read:
    return lambda limit: blob.read(offset, size if limit < 0 else min(size, limit))


def _zip_reader(blob: Blob, offset: int, size: int, stored: int) -> Read:
    def read(limit: int) -> bytes:
        start, wanted = stored_at(blob, offset), size if limit < 0 else min(size, limit)
        if stored < 0:
            return blob.read(start, wanted)
        packed = blob.read(start, stored if limit < 0 else min(stored, AHEAD))
        try:
            content = zlib.decompressobj(-15).decompress(packed, wanted) if wanted else b""
        except zlib.error as error:
            raise InputError(f"{blob.name} is damaged at byte {offset} ({error}); make the zip file again") from None
        if len(content) != wanted:
            raise InputError(f"{blob.name} is damaged at byte {offset}; make the zip file again")
        return content

    return read


def stored_at(blob: Blob, offset: int) -> int:
    """Where the bytes of a zip file's member begin whose local header is at an offset."""
    header = LOCAL_HEADER.unpack(blob.read(offset, LOCAL_HEADER.size))
    if header[0] != b"PK\3\4":
        raise InputError(f"{blob.name} is damaged at byte {offset}; make the zip file again")
    return offset + LOCAL_HEADER.size + int(header[-2]) + int(header[-1])


def _check_end(blob: Blob, offset: int) -> None:
    """A tar ends with blocks of zeros; where a header is cut or damaged, `tarfile` just stops there, silently."""
    end = min(offset + tarfile.BLOCKSIZE, blob.size)
    block = blob.read(offset, end - offset) if end > offset else b""
    if block != bytes(tarfile.BLOCKSIZE):
        raise InputError(f"{blob.name} is cut or damaged at byte {offset}; make the tar file again")
