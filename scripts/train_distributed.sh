#!/usr/bin/env bash
# Train with several processes on one machine: one for each GPU, or processes on the CPU with --cpu.
#
#   bash scripts/train_distributed.sh DATA --user-dir fairseq_autosize --prox l21 ...
#   bash scripts/train_distributed.sh --processes 2 DATA --user-dir fairseq_autosize --cpu ...
#
# --processes N  how many, given first (default: one for each GPU; on a CPU 2)
#
# Everything else goes to fairseq-train. An update's batch is that of one process, N times; to keep
# it as it was, divide --update-freq by N. GPUs are left to fairseq's own start of its processes.
# On a CPU that start runs nothing and still ends with status 0, so the processes are started here.
# If one of them fails, the others are stopped, and the status is 1.
set -euo pipefail

usage() { sed -n '2,12p' "${BASH_SOURCE[0]}" | cut -c3-; }
processes=''
case ${1:-} in
    '' | -h | --help) usage && exit 0 ;;
    --processes)
        if ! [[ ${2:-} =~ ^[1-9][0-9]*$ ]]; then
            echo "train_distributed.sh: error: --processes ${2:-}: must be a number >= 1" >&2
            exit 2
        fi
        processes=$2
        shift 2
        ;;
esac
if [[ " $* " != *' --cpu '* ]]; then
    exec fairseq-train "$@" ${processes:+--distributed-world-size "$processes"}
fi

processes=${processes:-2}
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
pids=()
# shellcheck disable=SC2317 # called by the trap
stop() { kill "${pids[@]}" 2>/dev/null || true; }
trap stop EXIT
for ((rank = 0; rank < processes; rank++)); do
    fairseq-train "$@" --distributed-world-size "$processes" --distributed-rank "$rank" \
        --distributed-no-spawn --distributed-init-method "tcp://localhost:$port" \
        --distributed-backend gloo --ddp-backend legacy_ddp &
    pids+=($!)
done
for ((rank = 0; rank < processes; rank++)); do
    if ! wait -n; then
        echo "train_distributed.sh: error: one of $processes processes failed" >&2
        exit 1
    fi
done
