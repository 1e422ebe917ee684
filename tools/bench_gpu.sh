#!/usr/bin/env bash
# The training step and sampling on one GPU, as a table: model, batch, attention kernel, compile, activation
# checkpointing.
#
#   bash tools/bench_gpu.sh DIRECTORY [key=value ...]
#
# Every line is a `bench.py` whose JSON goes into DIRECTORY; a line that fails (out of memory, no such kernel) is noted
# and passed over. Keys given here hold for all lines: with a tiny model and batch the script can be checked without a
# GPU, and STEPS makes it short.
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:?where to put the results}
shift
everywhere=("$@")
read -ra steps <<<"${STEPS:---steps 20 --turns 3 --warmup 5}"
mkdir -p "$directory"

line() {
  local name=$1 config=$3
  echo "== $name"
  python tools/bench.py "$2" "configs/imagenet256/$config.yaml" "${@:4}" "${everywhere[@]}" --json "$directory/$name.json" ||
    echo "$name" >>"$directory/failed.txt"
}

train() {
  line "$1" train "${@:2}" "${steps[@]}"
}

for batch in 32 64 128 256; do
  train "xl2-$batch" dit_xl2 engine.compile=true train.global_batch=$batch
done
train xl2-eager dit_xl2 train.global_batch=64 engine.compile=false
train xl2-plain dit_xl2 train.global_batch=64 engine.compile=true --compare plain
train xl2-sdpa dit_xl2 train.global_batch=64 engine.compile=true model.attention=sdpa
train xl2-cudnn dit_xl2 train.global_batch=64 engine.compile=true model.attention=cudnn
train xl2-flash dit_xl2 train.global_batch=64 engine.compile=true model.attention=flash
train xl2-recomputed dit_xl2 train.global_batch=256 engine.compile=true model.activation_checkpointing=true
train s2 dit_s2 train.global_batch=256 engine.compile=true
train b2 dit_s2 train.global_batch=128 engine.compile=true model.width=768 model.heads=12
train l2 dit_s2 train.global_batch=128 engine.compile=true model.width=1024 model.depth=24 model.heads=16
train unet unet_ldm8 train.global_batch=64
line sample-xl2 sample dit_xl2 evaluate.sampler=ddim evaluate.steps=50 evaluate.guidance=1.5 evaluate.block=64 \
  evaluate.precision=bf16
