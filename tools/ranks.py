"""Real processes that find each other as a launcher would make them: one environment a rank."""

import os
import subprocess
import sys
from typing import Any

from ldt.dist import free_port


def start_ranks(count: int, *arguments: object, **options: Any) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` on so many ranks of one world, in text mode."""
    port = str(free_port())
    out = []
    for rank in range(count):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        command = [sys.executable, *map(str, arguments)]
        out.append(subprocess.Popen(command, env=env | {"MASTER_PORT": port}, text=True, **options))
    return out
