# shellcheck shell=bash
# Sourced by every job script: what a shell on your nodes needs before it can run `python -m ldt`.
# This is the one place for modules, conda and containers; LDT_ENVIRONMENT names another file to use instead.
#
#   module load cuda/12.4                                      modules
#   source ~/miniconda3/bin/activate ldt                       conda
#   LDT_RUN="apptainer exec --nv image.sif python -m ldt"      a container: how a task is started

if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
LDT_RUN=${LDT_RUN:-python -m ldt}
CPU_BIND=${LDT_CPU_BIND:-none} # of srun: bound to one core each, a task's loader threads would share it with the step
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
