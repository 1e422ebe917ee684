"""Files that are either whole or absent, and whether what was read from one has the shape it should."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, TypeGuard, TypeVar
from zipfile import BadZipFile

import xxhash

from ldt.errors import NO_ROOM, InputError, file_error

T = TypeVar("T")
TRIES = 20

MOST_CLASSES = 1 << 22  # above any data set: a damaged label must not fill the memory with names or counts
UNFINISHED = ".unfinished"  # suffix of what a killed writer leaves; never a final name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to be written in the block; it is then synced and takes the name of `path`.

    A crash at any point leaves the old file or the new one. A block that raises leaves the old one and nothing else.
    """
    check_writable_place(path)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}{UNFINISHED}")
    try:
        with naming(path, temporary):
            yield temporary
            with temporary.open("rb") as f:
                os.fsync(f.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def making(directory: Path) -> Iterator[Path]:
    """`replacing` for a directory that is not there yet: a temporary one, which takes its name after the block."""
    temporary = directory.with_name(directory.name + UNFINISHED)
    try:
        with naming(directory, temporary):
            shutil.rmtree(temporary, ignore_errors=True)  # a killed writer's
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(directory.parent)


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """A full disk that the block meets is one without room for `path`: the system says no name where it only writes.

    Libraries in Rust, such as safetensors, have the system's number in the words of an error of their own.
    """
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename  # the first is what was copied
        if error.errno in NO_ROOM and (not named or str(named).startswith(str(temporary or path))):
            error.filename = str(path)
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found and int(found[1]) in NO_ROOM:
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        raise


def check_writable_place(path: Path) -> None:
    """`InputError` where there is something else than a file.

    Who writes a pipe waits for a reader, and root would replace /dev/null, for the whole machine, by what is written.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        what = "directory" if stat.S_ISDIR(mode) else "pipe or a device"
        raise InputError(f"{path} is a {what}; give the path of a file")


def write_new(path: Path, text: str) -> None:
    """Create a file that says whose something is, whole or not at all; `FileExistsError` where there is one."""
    with naming(path), path.open("x") as f:
        try:
            f.write(text)
            f.flush()
        except OSError:
            path.unlink()  # else others would wait for the owner of an empty file
            raise


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """`replacing` for content in memory; where it can't be written, that is said in a sentence."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise file_error(str(path), error, "choose another place") from None


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` for a value as indented JSON."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def write_synced(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts one after another and fsync."""
    with naming(path), path.open("wb") as f:
        for part in parts:
            f.write(part)
        f.flush()
        os.fsync(f.fileno())


def write_npy(path: Path, array: Any) -> None:
    """`replacing` for an array as .npy. NumPy's own writer hides from files on a full disk why it stopped."""
    import numpy as np  # not for --help

    array = np.ascontiguousarray(array)
    with replacing(path) as temporary, temporary.open("wb") as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(array))
        f.write(array.reshape(-1).data.cast("B") if array.size else b"")


def regular(path: str, flags: int) -> int:
    """An `opener` of `open` for files: what waits for a writer, or never ends, is an `OSError`."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "it is a pipe or a device", path)


def sync_directory(path: Path) -> None:
    """Make renames within a directory survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_unfinished(directory: Path) -> None:
    """Delete what killed writers left behind; only when nobody writes there any more."""
    for leftover in directory.glob(f"*{UNFINISHED}"):
        leftover.unlink(missing_ok=True)


def unwritable(directory: Path) -> str:
    """Why this user may not write into a directory, which is made if need be; empty if nothing speaks against it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return "" if error.errno in NO_ROOM else error.strerror or str(error)


def hash_of(lines: Iterable[str]) -> str:
    """128 bits of the lines in their order, as hexadecimal text."""
    digest = xxhash.xxh3_128()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def parse_json(content: str | bytes) -> Any:
    """`json.loads`, all of whose complaints are ValueErrors."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def beside_threads(read: Callable[[], T]) -> T:
    """What `read` returns that makes numpy parse the header of an array.

    Threads of Python 3.11 that parse at the same time can be taken for a parser that went wrong (CPython issue 106905):
    a SystemError, of which the next try knows nothing.
    """
    for _ in range(TRIES):
        with contextlib.suppress(SystemError):
            return read()
    return read()


def load_npy(source: Path | BinaryIO) -> Any:
    """One array of an .npy file, never unpickled; all complaints but OSErrors are ValueErrors."""
    import numpy as np  # not for --help

    def read() -> Any:
        if not isinstance(source, Path):
            source.seek(start)
        return np.load(source, allow_pickle=False)

    start = 0 if isinstance(source, Path) else source.tell()
    try:
        array = beside_threads(read)
    except (SyntaxError, TokenError, EOFError, TypeError, OverflowError, MemoryError, BadZipFile) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an archive of arrays")
    return array


def npy_header(content: bytes) -> tuple[tuple[int, ...], bool, Any, int]:
    """Shape, whether in Fortran's order, dtype and length of the header that an .npy file begins with."""
    import numpy as np  # not for --help

    def read() -> tuple[tuple[int, ...], bool, Any, int]:
        stream = io.BytesIO(content)
        major = np.lib.format.read_magic(stream)[0]
        parse = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        return *parse(stream), stream.tell()

    return beside_threads(read)


def class_names(directory: Path, largest: int) -> list[str]:
    """`classes.txt`, one name a line, where it is there; else the numbers."""
    path = directory / "classes.txt"
    if not path.exists():
        return [str(i) for i in range(largest + 1)]
    return named_classes(path.read_bytes(), str(path), largest)


def named_classes(content: bytes, path: str, largest: int) -> list[str]:
    """The lines of a list of class names, which must be at least `largest` + 1 and all different."""
    try:
        names = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; write it again, one class name a line") from None
    if len(names) <= largest:
        raise InputError(f"{path} has {len(names)} names, too few for label {largest}; write one a line")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path} has the name {twice!r} twice; give each class a name of its own")
    return names


def natural(value: Any) -> bool:
    """Whether parsed JSON is a whole number from 0 that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def real(value: Any) -> TypeGuard[float]:
    """Whether parsed JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def schema_error(value: Any, shape: Any, name: str = "it") -> str:
    """What in parsed JSON is not of a shape, in words; empty if all is.

    A shape is a type, a predicate, `[shape]` of every item of a list, `{...: shape}` of every value of a mapping, or
    `{"key": shape}` of the keys that must be in it.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is no mapping"
        every = shape.get(...)
        inner = dict.fromkeys(value, every) if every is not None else shape
        missing = [key for key in inner if key not in value]
        if missing:
            return f"{name} has no {missing[0]}"
        return next((m for key in inner if (m := schema_error(value[key], inner[key], f"{name}.{key}"))), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        return next((m for i, item in enumerate(value) if (m := schema_error(item, shape[0], f"{name}[{i}]"))), "")
    fits = isinstance(value, shape) if isinstance(shape, type) else shape(value)
    return "" if fits else f"{name} is {repr(value)[:60]}"
