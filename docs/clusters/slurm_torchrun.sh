#!/usr/bin/env bash
# One node of eight GPUs under SLURM, by torchrun, which starts the processes anew (three times) when one of them dies:
# sbatch docs/clusters/slurm_torchrun.sh recipe=smollm2_135m data.train=/data/text.txt
#SBATCH --job-name=qat
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
export OMP_NUM_THREADS="$((${SLURM_CPUS_PER_TASK:-64} / 8))"

exec srun torchrun --standalone --nproc-per-node 8 --max-restarts 3 -m qat.train "$@" \
  trainer=gpu \
  trainer.devices=8 \
  trainer.strategy=fsdp2 \
  run.dir="runs/slurm/${SLURM_JOB_ID}" \
  resume=auto
