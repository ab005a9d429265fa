#!/usr/bin/env bash
# Two nodes of eight GPUs under SLURM: sbatch docs/clusters/slurm.sh recipe=smollm2_135m data.train=/data/text.txt
#
# srun starts a process for each GPU, which find each other by what SLURM says. The same line starts the run and continues it
# (resume=auto), so that a job that was preempted, or ran into its time limit, goes on where it was: 120 seconds before the limit
# SIGTERM makes the run write a checkpoint and end with 143, and the job asks to be queued again.
#SBATCH --job-name=qat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -u
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-8}"
export WANDB_MODE="${WANDB_MODE:-offline}"

code=0
srun --kill-on-bad-exit=1 python -m qat.train "$@" \
  trainer=gpu \
  trainer.devices="${SLURM_NTASKS_PER_NODE:-8}" \
  trainer.num_nodes="${SLURM_NNODES:-2}" \
  trainer.strategy=fsdp2 \
  run.dir="runs/slurm/${SLURM_JOB_ID}" \
  resume=auto || code=$?

if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
