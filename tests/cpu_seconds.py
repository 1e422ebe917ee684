"""CPU seconds of each test and file, those of all their processes included: `python tests/cpu_seconds.py [pytest's]`.

Wall time says nothing on a machine that others use. Run as a program this file starts pytest in one process and
adopts what loses its parent, as SLURM's daemons do, so that the tree of its processes holds all that tests start.
In pytest it is a plugin, which looks at that tree before and after each test; a fixture counts to its first test.
"""

import ctypes
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = "LDT_TESTS_ROOT_PROCESS"
TAKEN = pytest.StashKey[dict[str, float]]()
BECOME_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h


def tree_seconds(root: int) -> float:
    """User and system seconds of a process and its descendants, the ended ones that were waited for included."""
    children, seconds = defaultdict(list), {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        process = int(path.parent.name)
        children[int(fields[1])].append(process)
        seconds[process] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    found, left = 0.0, [root]
    while left:
        process = left.pop()
        found += seconds.get(process, 0.0)
        left += children[process]
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = tree_seconds(int(os.environ[ROOT]))
    result = yield
    item.config.stash.setdefault(TAKEN, {})[item.nodeid] = tree_seconds(int(os.environ[ROOT])) - before
    return result


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shown", type=float, default=2.0, help="show tests of so many CPU seconds")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    taken, files = config.stash.get(TAKEN, {}), defaultdict(float)
    for test, seconds in taken.items():
        files[test.partition("::")[0]] += seconds
    terminalreporter.section("CPU seconds")
    for rows in ({t: s for t, s in taken.items() if s >= config.getoption("shown")}, files):
        for name, seconds in sorted(rows.items(), key=lambda row: -row[1]):
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        terminalreporter.write_line("")
    start = tree_seconds(int(os.environ[ROOT])) - sum(taken.values())
    terminalreporter.write_line(f"{sum(taken.values()):8.1f}  all tests, after {start:.1f} of imports and collection")


def main() -> int:
    """Run pytest below this process; its exit code."""
    ctypes.CDLL(None).prctl(BECOME_SUBREAPER, 1, 0, 0, 0)
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    env = os.environ | {ROOT: str(os.getpid()), "PYTHONPATH": paths}
    tests = subprocess.Popen([sys.executable, "-m", "pytest", "-p", "cpu_seconds", *sys.argv[1:]], env=env)
    while True:
        process, status = os.wait()
        if process == tests.pid:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
