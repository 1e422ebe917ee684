"""Real permissions: the superuser of a test machine may read everything, so what others meet is tried as `nobody`."""

import json
import os
import pwd
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def as_nobody(action: Callable[[], Any]) -> Any:
    """What the action returns (as JSON can tell it) when a user without privileges does it."""
    if os.geteuid() != 0:
        return action()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer: dict[str, Any] = {}
        try:
            os.close(reader)
            user = pwd.getpwnam("nobody")
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            answer = {"result": action()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        finally:
            with os.fdopen(writer, "w") as out:
                json.dump(answer, out)
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        answer = json.load(answers)
    os.waitpid(child, 0)
    assert "error" not in answer, answer["error"]
    return answer["result"]


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that everybody may enter and write into, as `tmp_path` is not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    for directory in [path, *(p for p in path.rglob("*") if p.is_dir() and not p.is_symlink())]:
        directory.chmod(0o777)
    shutil.rmtree(path)
