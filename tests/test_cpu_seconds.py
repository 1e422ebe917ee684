"""The measurement of the suite itself: what a test's processes take is that test's, also of those that left it."""

import re
import subprocess
import sys
from pathlib import Path

BUSY = """
import subprocess, sys, time
BURN = "import time\\nwhile time.process_time() < {}: pass"
ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', sys.argv[1]])"

def test_child():
    subprocess.run([sys.executable, "-S", "-c", BURN.format(0.4)])

def test_orphan(tmp_path):
    done = f"{BURN.format(0.8)}\\nopen({str(tmp_path / 'done')!r}, 'w')"
    subprocess.run([sys.executable, "-S", "-c", ORPHAN, done])
    while not (tmp_path / "done").exists():
        time.sleep(0.01)

def test_nothing():
    pass
"""


def test_children_and_orphans_are_counted_to_their_test(tmp_path):
    (tmp_path / "test_busy.py").write_text(BUSY)
    tool = Path(__file__).with_name("cpu_seconds.py")
    command = [sys.executable, tool, "--shown", "0", tmp_path, "-q", f"--rootdir={tmp_path}", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {name: float(seconds) for seconds, name in re.findall(r"^ *([\d.]+)  (\S+)", done.stdout, re.M)}
    child, orphan, nothing = (found[f"test_busy.py::test_{name}"] for name in ("child", "orphan", "nothing"))
    assert child >= 0.3 and orphan >= 0.7 and nothing < child
    assert abs(found["test_busy.py"] - child - orphan - nothing) < 0.3
