#!/usr/bin/env bash
# Train on a Slurm cluster, one task for each GPU, or with --cpu one task for each process.
#
#   sbatch scripts/train_slurm.sh DATA --user-dir fairseq_autosize --prox l21 ...
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 scripts/train_slurm.sh DATA ...
#   sbatch --gpus-per-node=0 --ntasks-per-node=2 scripts/train_slurm.sh DATA --cpu ...
#
# Keep --ntasks-per-node and --gpus-per-node equal. Everything after the script's name goes to
# fairseq-train. An update's batch is that of one task, times their number. If one task fails, the
# others are stopped, and the job fails. A job that is requeued goes on from its last checkpoint.
# PORT (default: from the job's number) is where the processes meet, on the first host.
#SBATCH --job-name=autosize
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,11p' "${BASH_SOURCE[0]}" | cut -c3-
    exit 0
fi
if [[ -z ${SLURM_NTASKS:-} ]]; then
    echo "train_slurm.sh: error: not in a Slurm job; submit it: sbatch scripts/train_slurm.sh ..." >&2
    exit 2
fi
if ((SLURM_NTASKS != SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-SLURM_NTASKS})); then
    echo "train_slurm.sh: error: $SLURM_NTASKS tasks on $SLURM_NNODES nodes with" \
        "${SLURM_NTASKS_PER_NODE:-an unknown number} on each: give --nodes and --ntasks-per-node, and no --ntasks" >&2
    exit 2
fi
port=${PORT:-$((10000 + SLURM_JOB_ID % 20000))}
world=(--distributed-world-size "$SLURM_NTASKS")
# Since Slurm 22.05 srun does not take the job's --cpus-per-task over by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Without the first, the other tasks wait half an hour for one that has ended.
task=(srun --kill-on-bad-exit=1)
if [[ " $* " != *' --cpu '* ]]; then
    # fairseq reads ranks and hosts from Slurm's variables.
    exec "${task[@]}" fairseq-train "$@" "${world[@]}" --distributed-port "$port"
fi
# On a CPU fairseq takes one task a node for one with no GPUs, trains nothing and ends with status 0.
read -r host < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# shellcheck disable=SC2016 # each task has its own SLURM_PROCID
exec "${task[@]}" bash -c 'exec fairseq-train "$@" --distributed-rank "$SLURM_PROCID"' fairseq-train \
    "$@" "${world[@]}" --distributed-no-spawn --distributed-init-method "tcp://$host:$port" \
    --distributed-backend gloo --ddp-backend legacy_ddp
