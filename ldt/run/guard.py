"""The watchdog's watchdog: a separate process that ends a rank whose interpreter is stuck with all its threads.

    python guard.py PID SECONDS      a byte comes on stdin every second or so while the rank's interpreter runs

A timer inside of the rank would count the time in which the whole job stood still (a suspended job, a paused container,
a closed laptop) and end it when it goes on. This process counts only seconds in which it runs itself and the rank is
not stopped. It ends with the rank. It imports nothing of ldt, for it must be small.
"""

import contextlib
import os
import select
import signal
import sys
import time

DUMP_SIGNAL = signal.SIGRTMAX  # the rank has told faulthandler to write its stacks at this one
DUMP_PERIOD_S = 1.0


def is_stopped(pid: int) -> bool:
    """Whether the kernel reports the process as stopped, by SIGSTOP or by a debugger."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def main(pid: int, seconds: float) -> None:
    """Wait for the end of stdin; after so many seconds without a byte, kill the rank."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # meant for the rank
        signal.signal(number, signal.SIG_IGN)
    quiet = 0.0
    while quiet < seconds:
        if select.select([0], [], [], 1.0)[0]:
            if not os.read(0, 4096):
                return
            quiet = 0.0
        elif not is_stopped(pid):
            quiet += 1.0
    os.kill(pid, DUMP_SIGNAL)
    said = f"process {pid} has run no Python code for {seconds:g} s and is killed; its stacks are in stalls/\n"
    with contextlib.suppress(OSError):  # stderr is on a full disk
        os.write(2, said.encode())
    time.sleep(DUMP_PERIOD_S)
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
