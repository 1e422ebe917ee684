"""What an attempt runs with: command line, versions, host, scheduler job and the state of the source tree."""

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ldt import __version__
from ldt.cluster.job import this_job

SECRET = re.compile("key|token|secret|password|credential", re.I)


LITERAL = re.compile(rf"((?:{SECRET.pattern})\w*[\"']?\s*[=:]\s*[\"']?)(?=[\w./+-]*\d)[\w./+-]{{20,}}", re.I)


def environment(world_size: int) -> dict[str, Any]:
    """What this attempt runs with: command line, versions, host, scheduler job and git state."""
    job = this_job()
    return {
        "time": time.time(),
        "command": [without_secrets(word) for word in sys.argv],
        "world_size": world_size,
        "host": platform.node(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "ldt": __version__,
        "job": job.id or None,
        "restart": job.restart or None,
        "nodes": job.nodes or None,
        "git": git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),  # the commit, not a tag
    }


def hardware() -> str:
    """What a process of this machine computes on: its GPU, or how many CPUs of which kind it may use."""
    import torch  # not for --help

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return f"{len(os.sched_getaffinity(0))} x {names[0] if names else platform.machine()}"


def without_secrets(text: str) -> str:
    """A text without the values of secrets in the environment, and without long literals that are named like one."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "<removed>")
    return LITERAL.sub(r"\1<removed>", text)


def git(*words: str) -> str | None:
    """The output of git in the source tree; None for an installed package, even inside somebody's repository."""
    here, said = Path(__file__), ""
    for command in (["ls-files", "--error-unmatch", here.name], words):
        try:  # a diff may show text that is no UTF-8
            done = subprocess.run(
                ["git", "-C", str(here.parent), *command], capture_output=True, errors="replace", timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        said = done.stdout.strip()
    return said or None
