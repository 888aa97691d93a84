#!/usr/bin/env bash
# Check on a GPU the training modes that a CPU cannot run; see docs/training-modes.md.
#
#   bash scripts/check_gpu.sh [DIR]      # default: runs/check-gpu; minutes on one GPU
#
# Each mode trains the embedded corpus to a target of half of the neurons, is stopped on the way and
# once more after the freeze, and must end with exactly that half dead and translate (bf16 runs in
# one go and does not translate). It prints PASS or FAIL for each mode, or SKIP where a second GPU or
# apex is missing.
# Status: 0 if none failed, 1 if one did, 2 if there is no GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1:-} == -* ]]; then
    sed -n '2,10p' "${BASH_SOURCE[0]}" | cut -c3-
    [[ $1 == -h || $1 == --help ]] && exit 0 || exit 2
fi
out=$(realpath -m "${1:-$root/runs/check-gpu}")
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [[ $gpus == 0 ]]; then
    echo "check_gpu.sh: no GPU found (torch.cuda.device_count() is 0): nothing was checked" >&2
    exit 2
fi
if [[ ! -f $out/data/prepare.json ]]; then
    python "$root/scripts/prepare_data.py" embedded "$out/data" >/dev/null
fi

options=(
    "$out/data/data-bin" --user-dir "$root/fairseq_autosize"
    --prox l21 --prox-target-sparsity 0.5 --prox-freeze-update 120
    --arch transformer --share-all-embeddings --activation-fn relu
    --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512
    --encoder-attention-heads 4 --decoder-layers 2 --decoder-embed-dim 128
    --decoder-ffn-embed-dim 512 --decoder-attention-heads 4
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --optimizer adam --lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates 50 --max-tokens 2000
    --required-batch-size-multiple 1 --num-workers 0 --seed 1 --no-epoch-checkpoints
)

# train NAME OPTION...: three parts of one training, and a translation
train() {
    local run=$out/$1
    shift
    for updates in 60 140 200; do # on the way to the target, after the freeze, the end
        fairseq-train "${options[@]}" --save-dir "$run" --max-update "$updates" "$@" || return
    done
    fairseq-generate "$out/data/data-bin" --user-dir "$root/fairseq_autosize" --max-tokens 2000 \
        --path "$run/checkpoint_last.pt" --beam 1 --required-batch-size-multiple 1 \
        --max-len-b 30 >"$run/generated.txt" || return
    [[ $(grep -c '^H-' "$run/generated.txt") == 500 ]] || return
    fairseq-autosize count "$run/checkpoint_last.pt" --json >"$run/count.json" || return
    python -c '
import json, sys
neurons = json.load(open(sys.argv[1]))["ffn_neurons"]
sys.exit(neurons != {"total": 2048, "alive": 1024, "pruned": 1024})
' "$run/count.json"
}

# bf16: fairseq-train cannot be told (--bf16 means a TPU there), fairseq-hydra-train can
train_bf16() {
    mkdir -p "$out/bf16"
    cat >"$out/bf16/bf16.yaml" <<YAML || return
# @package _group_
common: {user_dir: "$root/fairseq_autosize", bf16: true, seed: 1}
task:
  _name: translation_autosize
  data: "$out/data/data-bin"
  prox: l21
  prox_target_sparsity: 0.5
  prox_freeze_update: "120"
model:
  _name: transformer
  share_all_embeddings: true
  encoder: {layers: 2, embed_dim: 128, ffn_embed_dim: 512, attention_heads: 4}
  decoder: {layers: 2, embed_dim: 128, ffn_embed_dim: 512, attention_heads: 4}
criterion: {_name: cross_entropy}
optimizer: {_name: adam}
lr_scheduler: {_name: inverse_sqrt, warmup_updates: 50}
dataset: {max_tokens: 2000, required_batch_size_multiple: 1, num_workers: 0}
distributed_training: {distributed_world_size: 1}
optimization: {max_update: 200, lr: [0.003]}
checkpoint: {save_dir: "$out/bf16", no_epoch_checkpoints: true}
YAML
    (cd "$out/bf16" && fairseq-hydra-train --config-dir "$out/bf16" --config-name bf16) || return
    fairseq-autosize count "$out/bf16/checkpoint_last.pt" --json | grep -q '"pruned": 1024'
}

failed=0
# check NAME COMMAND...: run it, its output in a file, and say how it went
check() {
    local name=$1
    shift
    rm -rf "${out:?}/$name" "$out/$name.log"
    if "$@" >"$out/$name.log" 2>&1; then
        echo "PASS $name"
    else
        echo "FAIL $name (see $out/$name.log)"
        failed=1
    fi
}

one=(--distributed-world-size 1)
apex() { python -c 'import apex.optimizers, amp_C' 2>/dev/null; }
check fp32 train fp32 "${one[@]}" --use-old-adam
check fp16-flat train fp16-flat "${one[@]}" --fp16 --use-old-adam
check fp16-not-flat train fp16-not-flat "${one[@]}" --fp16 --fp16-no-flatten-grads --use-old-adam
check fp16-overflow train fp16-overflow "${one[@]}" --fp16 --fp16-init-scale 1073741824
check amp train amp "${one[@]}" --amp
check bf16 train_bf16
if apex; then
    check fused-adam train fused-adam "${one[@]}" --fp16
else
    echo "SKIP fused-adam: apex with its CUDA extensions is not installed"
fi
if ((gpus > 1)); then
    check nccl-2 train nccl-2 --distributed-world-size 2
    check nccl-2-fp16 train nccl-2-fp16 --distributed-world-size 2 --fp16 --ddp-backend legacy_ddp
else
    echo "SKIP nccl-2, nccl-2-fp16: one GPU only"
fi
exit "$failed"
