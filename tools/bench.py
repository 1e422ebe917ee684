"""Benchmarks: `python tools/bench.py NAME …`, or under torchrun for several processes. One file beside this for each.

Prints a table and, with --json F, stores it with hardware, versions, date and command.
"""

import argparse
import importlib
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from program import run_tool

from ldt.checkpoint.manifest import versions
from ldt.files import write_json

BENCHMARKS = {
    "checkpoint": "how long training stops for a checkpoint, how fast it is written and read; what averages cost",
    "encode": "encoding images against the autoencoder alone",
    "index": "the index of image shards: time and memory",
    "data": "the loader against a memmap gather, beside other readers",
    "train": "the training step: images a second, time by phase, use of the machine's matrix products",
    "sample": "latents a second with guidance, eager and compiled",
    "evaluate": "images a second of an evaluation against its raw sampler and detector",
}


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, summary in BENCHMARKS.items():
        command = commands.add_parser(name, help=summary)
        importlib.import_module(f"bench_{name}").add_arguments(command)
        command.add_argument("--json", type=Path, help="file for the result")
    arguments, rest = parser.parse_known_args()
    if any(a.startswith("-") or "settings" not in arguments for a in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value after an option, which argparse doesn't give to the list before it
        arguments.settings += rest
    result: dict[str, Any] | None = importlib.import_module(f"bench_{arguments.name}").run(arguments)
    if result is None:  # not rank 0
        return 0
    for key, value in result.items():
        print(f"{key:40} {value:.4g}" if isinstance(value, float) else f"{key:40} {value}")
    if arguments.json:
        about = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "command": sys.argv, **versions()}
        write_json(arguments.json, result | about)
    return 0


def hardware() -> str:
    """The device that did the work."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(models)} x {models[0] if models else platform.processor()}"


if __name__ == "__main__":
    run_tool(main)
