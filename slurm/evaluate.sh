#!/usr/bin/env bash
# Score a run's checkpoints as a job of its own, from the repository's directory:
#
#   sbatch [--partition=P --gpus-per-node=2] slurm/evaluate.sh RUN [key=value ...]       the newest checkpoint
#   sbatch slurm/evaluate.sh RUN --watch                                                follow the run, score each once
#   sbatch --dependency=afterok:JOB slurm/evaluate.sh RUN                               after the training JOB
#
# Interrupted, it goes on from finished blocks: nothing is scored twice.
#SBATCH --job-name=ldt-evaluate
#SBATCH --nodes=1
#SBATCH --requeue --open-mode=append
#SBATCH --output=ldt-evaluate-%j.log
set -uo pipefail
: "${SLURM_JOB_ID:?is not set: submit this script with sbatch, or run ldt evaluate itself}"
# shellcheck source=slurm/environment.sh
source "${LDT_ENVIRONMENT:-slurm/environment.sh}"
GPUS=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
TASKS=${LDT_TASKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${GPUS##*:}}} # a100:8 is 8
# shellcheck disable=SC2086  # LDT_RUN is several words
exec srun --kill-on-bad-exit=1 --overcommit "--cpu-bind=$CPU_BIND" --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$TASKS" $LDT_RUN evaluate "$@"
