"""Real permissions for root's processes: what other users meet on a machine is tried on a test machine too."""

import ctypes
import os

OVERRIDES = (1, 2, 3)
"""Numbers of the capabilities dac_override, dac_read_search and fowner: to pass over permission bits."""


def drop_overrides() -> None:
    """From here on, permission bits apply to this process, even if it is root's."""
    if os.geteuid() != 0:
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their upper halves
    mask = ~sum(1 << n for n in OVERRIDES) & 0xFFFFFFFF
    for n in OVERRIDES:
        libc.prctl(24, n, 0, 0, 0)  # PR_CAPBSET_DROP: else root has them again after the next exec
    for call in (libc.capget, libc.capset):
        sets[:3] = [word & mask for word in sets[:3]]
        if call(header, sets):
            raise OSError(ctypes.get_errno(), "capabilities can't be changed")
