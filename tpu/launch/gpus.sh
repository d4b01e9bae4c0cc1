#!/usr/bin/env bash
# Train on the GPUs of this machine: one process drives them all.
#
#   tpu/launch/gpus.sh [--gpus 0,1,2,3] [--dry-run] RECIPE --dotted.field value ...
#
#   tpu/launch/gpus.sh gpt2_124m --data.source text --data.path corpus/ --mesh.fsdp 8
#
# --gpus LIST   only these (numbers of nvidia-smi); default: $CUDA_VISIBLE_DEVICES, or all
# --dry-run     check nothing, show the command
# --help        this text
#
# Before it starts, nvidia-smi must answer within 60 s, show every GPU asked for, and none with
# uncorrected memory errors. A GPU that holds memory of other programs is named.
# Environment: PYTHON (default .venv/bin/python of this checkout),
# XLA_PYTHON_CLIENT_MEM_FRACTION (share of GPU memory for JAX, default here 0.92).
set -euo pipefail

# shellcheck source=tpu/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
HOME_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

while [[ ${1:-} == --* ]]; do
  case $1 in
  --help) help && exit 0 ;;
  --dry-run) DRY_RUN=1 ;;
  --gpus)
    [[ ${2:-} =~ ^[0-9]+(,[0-9]+)*$ ]] || die 2 "--gpus takes numbers like 0,1,2, got '${2:-}'"
    export CUDA_VISIBLE_DEVICES=$2
    shift
    ;;
  *) die 2 "unknown option $1 before the recipe (see --help)" ;;
  esac
  shift
done
[[ $# -gt 0 ]] || die 2 "no recipe: $PROGRAM RECIPE ... (train.py --list-recipes shows them)"

check_gpus() {
  local fields=index,name,memory.used,ecc.errors.uncorrected.volatile.total table wanted
  have nvidia-smi "the NVIDIA driver brings it"
  table=$(timeout 60 nvidia-smi --query-gpu=$fields --format=csv,noheader,nounits) ||
    die 69 "nvidia-smi fails or hangs: see dmesg for Xid errors"
  [[ -n $table ]] || die 69 "nvidia-smi shows no GPU"
  wanted=${CUDA_VISIBLE_DEVICES:-$(cut -d, -f1 <<<"$table" | paste -sd,)}
  local index row name used errors
  for index in ${wanted//,/ }; do
    [[ $index =~ ^[0-9]+$ ]] || continue # a UUID: JAX will tell
    row=$(grep "^$index," <<<"$table") || die 2 "there is no GPU $index; nvidia-smi shows: $(
      cut -d, -f1 <<<"$table" | paste -sd' '
    )"
    IFS=, read -r _ name used errors <<<"$row"
    [[ ! $errors =~ [1-9] ]] || die 69 "GPU $index ($name) has$errors uncorrected memory errors"
    ((used < 1024)) || echo "$PROGRAM: warning: GPU $index holds$used MiB of other programs" >&2
  done
}

[[ -n $DRY_RUN ]] || check_gpus
PYTHON=${PYTHON:-$HOME_DIR/.venv/bin/python}
[[ -x $PYTHON || -n $DRY_RUN ]] || die 2 "$PYTHON is not there: make setup, or set PYTHON"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
[[ -n $DRY_RUN ]] || exec "$PYTHON" "$HOME_DIR/scripts/train.py" "$@"
show env ${CUDA_VISIBLE_DEVICES:+"CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"} \
  "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION" \
  "$PYTHON" "$HOME_DIR/scripts/train.py" "$@"
