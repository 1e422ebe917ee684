"""What a path in a config may be: a local one, `~` for the home directory included, or an address where one is read.

Every key that holds a path is declared by `config_fields.path`, and `ldt.config` passes all of them through
`usable_path`: no program has to think of it, and none makes a directory called `s3:`.
"""

import os
import re
from pathlib import Path

from ldt.errors import InputError

_ONE_SLASH = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address (`s3://…`, `memory://…`) and not a local path."""
    return "://" in str(path)


def usable_path(key: str, text: str, remote: bool = False) -> str:
    """The path that `key=text` means, with `~` expanded. remote: whether this key may be an fsspec address.

    `InputError` for an address that the key can't take, for one that lost a slash, and for what no path can hold.
    """
    if not text.isprintable():
        raise InputError(f"{key}={text!r} holds a line break or another control character; give a path without them")
    if is_remote(text):
        if not remote:
            raise InputError(
                f"{key}={text} is a remote address, and {key} is read and written on local disks only; give a local "
                "path, and copy or mount what is elsewhere"
            )
        return text
    if _ONE_SLASH.match(text) and not os.path.exists(text):
        scheme, _, rest = text.partition(":/")
        raise InputError(f"{key}={text} is neither a path nor an address; did you mean {scheme}://{rest}?")
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise InputError(f"{key}={text} names the home directory of a user who is not known here; write it out")
    return expanded


def local_path(path: str | Path, key: str = "path") -> Path:
    """`usable_path` for a path that a Python program passes in, which must be local."""
    return Path(usable_path(key, str(path)))
