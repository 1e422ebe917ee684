"""Submit training runs: python tools/submit.py CONFIG [cluster=slurm|local|SITE] [nodes=2 tasks=8 …] [key=value …]

Prints the job ids and where to look. `--dry-run` shows what would be submitted. See docs/clusters.md.
"""

import sys
from inspect import cleandoc

from program import run_tool

from ldt.config import defaults_yaml
from ldt.submit import SubmitJob, submit


def main() -> int:
    """Submit; returns the exit code."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{cleandoc(SubmitJob.__doc__ or '')}\n\nKeys and defaults:\n\n{defaults_yaml(SubmitJob)}")
        return 0
    for line in submit(arguments):
        print(line)
    return 0


if __name__ == "__main__":
    run_tool(main)
