#!/usr/bin/env bash
# Images → latent shards on any number of nodes, from the repository's directory:
#
#   sbatch [--partition=P --nodes=4 --gpus-per-node=8] slurm/encode.sh CONFIG [key=value ...]
#
# Interrupted, it goes on from finished shards.
#SBATCH --job-name=ldt-encode
#SBATCH --nodes=1
#SBATCH --requeue --open-mode=append
#SBATCH --output=ldt-encode-%j.log
set -uo pipefail
: "${SLURM_JOB_ID:?is not set: submit this script with sbatch, or run ldt encode itself}"
# shellcheck source=slurm/environment.sh
source "${LDT_ENVIRONMENT:-slurm/environment.sh}"
GPUS=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
TASKS=${LDT_TASKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${GPUS##*:}}} # a100:8 is 8
# shellcheck disable=SC2086  # LDT_RUN is several words
exec srun --kill-on-bad-exit=1 --overcommit "--cpu-bind=$CPU_BIND" --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$TASKS" $LDT_RUN encode "$@"
