#!/usr/bin/env bash
# Train on any number of nodes, from the repository's directory:
#
#   sbatch [--partition=P --account=A --nodes=2-4 --gpus-per-node=8 --time=24:00:00] slurm/train.sh CONFIG [key=value ...]
#
# One task a GPU (LDT_TASKS_PER_NODE overrides). A request to stop (time limit, preemption, scancel --signal=USR1 --batch)
# ends in a checkpoint and a requeue; a lost node requeues on those that are left; a crash or a wrong config does not.
# srun reports 75 as an error of a task; what counts is `ldt verdict` below, which reads RUN/outcome.json.
# Site settings are flags of sbatch or SBATCH_* variables; what a shell on a node needs is in slurm/environment.sh.
#SBATCH --job-name=ldt-train
#SBATCH --nodes=1 --exclusive
#SBATCH --requeue --open-mode=append --signal=B:USR1@120
#SBATCH --output=ldt-train-%j.log
set -uo pipefail
: "${SLURM_JOB_ID:?is not set: submit this script with sbatch, or run ldt train itself}"
# shellcheck source=slurm/environment.sh
source "${LDT_ENVIRONMENT:-slurm/environment.sh}"
MAX_RESTARTS=${LDT_MAX_RESTARTS:-100}
GPUS=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
TASKS=${LDT_TASKS_PER_NODE:-${GPUS##*:}} # a100:8 is 8
RESTARTS=${SLURM_RESTART_COUNT:-0}
echo "job $SLURM_JOB_ID start $RESTARTS: $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x $TASKS tasks, $(date -Is)"

# shellcheck disable=SC2086  # LDT_RUN is several words
srun --kill-on-bad-exit=1 --overcommit "--cpu-bind=$CPU_BIND" --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$TASKS" $LDT_RUN train "$@" &
step=$!
cancelled=0
trap 'echo "request to stop, $(date -Is)"; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'cancelled=1' TERM
while wait "$step"; code=$?; kill -0 "$step" 2>/dev/null; do :; done # a signal ends wait, not the step

# shellcheck disable=SC2086
$LDT_RUN verdict "$@" launcher_code="$code"
code=$?
if [ "$code" = 75 ] && [ "$cancelled" = 0 ] && [ "$RESTARTS" -lt "$MAX_RESTARTS" ]; then
  echo "stopped on request: requeued"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this script meanwhile
fi
exit "$code"
