#!/usr/bin/env bash
# Is this machine, with its GPUs, as good as the CPU whose answers are known? On a fresh machine of 1 to 8 GPUs:
#
#   bash tools/gpu_check.sh DIRECTORY [--only WORD ...]
#
# DIRECTORY/gpu_check.json and gpu_check.html say what was run, what came out, how fast it was; the last line and the exit
# code say whether anything differs. Without a GPU everything but the rates runs on the CPU, with two processes.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python tools/gpu_check.py "$@"
