#!/usr/bin/env bash
# Train on the GPUs of a Slurm cluster; fairseq reads ranks and hosts from Slurm's variables.
#
#   sbatch scripts/train_slurm.sh DATA --user-dir fairseq_autosize --prox l21 ...
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 scripts/train_slurm.sh DATA ...
#
# One task for each GPU: keep --ntasks-per-node and --gpus-per-node equal. Everything after the
# script's name goes to fairseq-train. An update's batch is that of one GPU, times their number.
# PORT (default 9218) is where the processes meet. Two jobs on one host need two ports.
#SBATCH --job-name=autosize
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,9p' "${BASH_SOURCE[0]}" | cut -c3-
    exit 0
fi
if [[ -z ${SLURM_NTASKS:-} ]]; then
    echo "train_slurm.sh: error: not in a Slurm job; submit it: sbatch scripts/train_slurm.sh ..." >&2
    exit 2
fi
exec srun fairseq-train "$@" \
    --distributed-world-size "$SLURM_NTASKS" --distributed-port "${PORT:-9218}"
