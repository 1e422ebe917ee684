"""Processes to which permission bits apply though the tests run as root: `[*UNPRIVILEGED, program, argument, ...]`."""

UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
