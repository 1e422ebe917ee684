#!/usr/bin/env bash
# The training step on one GPU, as a table: model, batch, attention kernel, compile, activation checkpointing.
#
#   bash tools/bench_gpu.sh DIRECTORY [key=value ...]
#
# Every line is a `bench.py train` whose JSON goes into DIRECTORY; a line that fails (out of memory) is noted and passed
# over. Keys given here hold for all lines: with a tiny model and batch the script can be checked without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:?where to put the results}
shift
mkdir -p "$directory"

declare -A models=(
  [b2]="{width: 768, depth: 12, heads: 12, patch: 2, conditioning: adaln_zero, positions: sincos, norm: layer, qk_norm: false, mlp: gelu}"
  [l2]="{width: 1024, depth: 24, heads: 16, patch: 2, conditioning: adaln_zero, positions: sincos, norm: layer, qk_norm: false, mlp: gelu}"
)

line() {
  local name=$1 config=$2
  shift 2
  echo "== $name"
  # shellcheck disable=SC2086  # the settings of all lines are words
  python tools/bench.py train "configs/imagenet256/$config.yaml" "$@" "${everywhere[@]}" $STEPS --json "$directory/$name.json" ||
    echo "$name failed" | tee -a "$directory/failed.txt"
}

everywhere=("$@")
STEPS=${STEPS:-"--steps 20 --turns 3 --warmup 5"}

for batch in 32 64 128 256; do
  line "xl2-$batch" dit_xl2 train.global_batch=$batch engine.compile=true
done
line xl2-eager dit_xl2 train.global_batch=64
line xl2-plain dit_xl2 train.global_batch=64 engine.compile=true --compare plain
line xl2-sdpa dit_xl2 train.global_batch=64 engine.compile=true model.attention=sdpa
line xl2-flash dit_xl2 train.global_batch=64 engine.compile=true model.attention=flash
line xl2-recomputed dit_xl2 train.global_batch=256 engine.compile=true model.activation_checkpointing=true
line s2 dit_s2 train.global_batch=256 engine.compile=true
for size in b2 l2; do
  line $size dit_s2 train.global_batch=128 engine.compile=true "model=${models[$size]}"
done
line unet unet_ldm8 train.global_batch=64
