#!/usr/bin/env bash
#SBATCH --job-name=aniso
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

# Train on GPU nodes of a Slurm cluster, one process for each GPU.
#
#   RUN=/shared/runs/llama sbatch --nodes=4 tpu/launch/slurm.sh \
#       llama3_1b --data.source parquet --data.path /shared/corpus --mesh.fsdp 32
#
# Submit it from the checkout, which all nodes must see at the same path. Options of sbatch override
# the #SBATCH lines; with --ntasks-per-node=1 one process drives all GPUs of its node.
#
#   bash tpu/launch/slurm.sh --dry-run RECIPE ...   shows what a job would run
#   bash tpu/launch/slurm.sh --help                 this text
#
# Environment: RUN, the run folder on storage that all nodes share (required); ANISO_HOME, the
# checkout (default: where sbatch was called); PYTHON (default $ANISO_HOME/.venv/bin/python);
# MAX_RESTARTS (default 20). NCCL_* and JAX_* are passed on and printed.
#
# First every node is checked: nvidia-smi answers and shows the node's GPUs without uncorrected
# errors, Python starts, $RUN can be written. A bad node ends the job with its name on it.
# Five minutes before the time limit, and on preemption, training gets SIGTERM, saves, and the job
# is put into the queue again; so it is after a crash or a lost node. A run that diverged, or a flag
# that cannot work, is not tried again.
set -euo pipefail

usage() { sed -n '/^# Train/,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

die() {
  local code=$1
  shift
  echo "slurm.sh: error: $*" >&2
  exit "$code"
}

DRY_RUN=
case ${1:-} in
--help) usage && exit 0 ;;
--dry-run) DRY_RUN=1 && shift ;;
--*) die 2 "unknown option $1 before the recipe (see --help)" ;;
esac
[[ $# -gt 0 ]] || die 2 "no recipe (train.py --list-recipes shows them; --help shows the rest)"
[[ -n ${RUN:-} ]] || die 2 "RUN is not set: the run folder, on storage that all nodes share"
[[ -n ${SLURM_JOB_ID:-} || -n $DRY_RUN ]] || die 2 "not in a Slurm job: sbatch tpu/launch/slurm.sh ..."

# Slurm runs a copy of this file, so its own place says nothing.
ANISO_HOME=${ANISO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
PYTHON=${PYTHON:-$ANISO_HOME/.venv/bin/python}
[[ -e $ANISO_HOME/scripts/train.py ]] ||
  die 2 "no scripts/train.py in $ANISO_HOME: submit from the checkout, or set ANISO_HOME"
export ANISO_HOME PYTHON RUN
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Since Slurm 22.05 srun does not take over --cpus-per-task of sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# shellcheck disable=SC2016  # expanded on each node
CHECK='
fail() { echo "unhealthy node $(hostname): $*" >&2; exit 69; }
mkdir -p "$RUN" && [ -w "$RUN" ] || fail "cannot write to RUN=$RUN"
"$PYTHON" -c "import jax" || fail "$PYTHON cannot import jax"
fields=index,ecc.errors.uncorrected.volatile.total
gpus=$(timeout 60 nvidia-smi --query-gpu=$fields --format=csv,noheader) ||
  fail "nvidia-smi fails or hangs (see dmesg for Xid errors)"
count=$(grep -c . <<<"$gpus")
[ "$count" -ge "${SLURM_GPUS_ON_NODE:-1}" ] ||
  fail "nvidia-smi shows $count GPUs, the job has ${SLURM_GPUS_ON_NODE:-1} here"
bad=$(grep -E ", *[1-9]" <<<"$gpus" | cut -d, -f1 | paste -sd" ")
[ -z "$bad" ] || fail "uncorrected memory errors on GPU $bad"
'
# A task that ends does not take the others with it at once: after SIGTERM they may still be saving.
TRAIN=(srun --kill-on-bad-exit=0 --wait=300 --label "$PYTHON" "$ANISO_HOME/scripts/train.py" "$@"
  --out "$RUN" --resume)
HEALTH=(srun --ntasks-per-node=1 "--ntasks=${SLURM_JOB_NUM_NODES:-1}" bash -c "$CHECK")

if [[ -n $DRY_RUN ]]; then
  echo "# on every node:$CHECK"
  printf '%q ' "${TRAIN[@]}"
  echo
  exit 0
fi

env | grep -E '^(NCCL|JAX|XLA|LIBTPU)_' | sort
timeout 300 "${HEALTH[@]}" ||
  die 69 "a node is not fit (see above): submit again with --exclude=NODE"

"${TRAIN[@]}" &
child=$!
# The batch shell alone gets --signal=B:TERM; srun hands it to all tasks.
trap 'kill -TERM "$child"' TERM
code=0
wait "$child" || code=$?
# A trapped signal ends wait before srun has ended.
while kill -0 "$child" 2>/dev/null; do
  code=0
  wait "$child" || code=$?
done
trap - TERM

restarts=${SLURM_RESTART_COUNT:-0}
case $code in
0) exit 0 ;;
2 | 3) die "$code" "train.py ended with code $code; the same job would end the same way" ;;
esac
((restarts < ${MAX_RESTARTS:-20})) || die "$code" "restarted $restarts times, not again (code $code)"
echo "slurm.sh: train.py ended with code $code; requeueing, restart $((restarts + 1))" >&2
scontrol requeue "$SLURM_JOB_ID"
