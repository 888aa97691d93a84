#!/usr/bin/env bash
# Train a dense and an auto-sized model on the embedded corpus, translate, score and count.
#
#   bash scripts/demo.sh                                  # about six minutes on 2 cores
#   bash scripts/demo.sh --data multi30k-de-en            # the same on a real pair
#   bash scripts/demo.sh --data mafand-hau-en --source DIR --out DIR --updates N --prox linf1@0.3
#
# --data     a name that scripts/prepare_data.py knows (default: embedded)
# --source   folder or address of that data (default: its public address)
# --out      where everything goes (default: runs/demo-NAME; a finished demo is not repeated)
# --updates  updates of each model (default: 800; real pairs: 1440)
# --prox     l21@0.5 (default): half of the neurons go; linf1@0.5, l21@0.7 and so on, or with a
#            strength in place of a target: l21 (its default), l21:1.5
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() { sed -n '2,13p' "${BASH_SOURCE[0]}" | cut -c3-; }
data=embedded source='' out='' updates='' prox=l21@0.5
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --data | --source | --out | --updates | --prox)
            if [[ $# -lt 2 ]]; then
                echo "demo.sh: error: $1 needs a value" >&2
                exit 2
            fi
            declare "${1#--}=$2"
            shift 2
            ;;
        *)
            echo "demo.sh: error: unknown option $1" >&2
            usage >&2
            exit 2
            ;;
    esac
done
out=${out:-$root/runs/demo-$data}
if [[ $data == embedded ]]; then
    recipe=(--updates "${updates:-800}" --layers 2 --warmup 200)
else
    recipe=(--updates "${updates:-1440}")
fi

bash "$root/scripts/setup.sh"
# shellcheck disable=SC1091
source "$root/.venv/bin/activate"
if [[ -f $out/data/prepare.json ]] && ! grep -qF "\"name\": \"$data\"" "$out/data/prepare.json"; then
    echo "demo.sh: error: --out $out has other data than $data; choose another folder" >&2
    exit 2
elif [[ ! -f $out/data/prepare.json ]]; then
    python "$root/scripts/prepare_data.py" "$data" "$out/data" ${source:+--source "$source"}
fi
python "$root/scripts/experiment.py" "$out/data" "$out" --runs dense "$prox" --jobs 2 "${recipe[@]}"

run=$out/${prox//[:@+=]/-}
printf '\nNeurons of the auto-sized model, layer by layer:\n'
fairseq-autosize count "$run/checkpoint_last.pt"
cat <<EOF

Where everything lies:
  data, prepared     $out/data
  dense model        $out/dense/checkpoint_last.pt
  auto-sized model   $run/checkpoint_last.pt
  training logs      $out/*/train.log
  translations       $out/*/*.out
  scores and counts  $out/results.json
EOF
