#!/usr/bin/env bash
# Train on Cloud TPU VMs: one VM or a pod slice of many hosts, by the same commands.
#
#   export PROJECT=my-project ZONE=us-east5-a
#   tpu/launch/tpu_vm.sh create my-tpu --type v5p-8 --spot
#   tpu/launch/tpu_vm.sh train  my-tpu gpt2_124m --data.source hf --data.path NAME --out /mnt/runs/a
#   tpu/launch/tpu_vm.sh logs   my-tpu
#
# create NAME --type TYPE [--spot] [--image VERSION]   the VM or slice (v5p-8 is one host, v5p-64 eight)
# setup NAME        copy this checkout to every host and install it there
# train NAME RECIPE --dotted.field value ...
#                   setup, then start train.py on every host, in the background
# logs NAME         follow the log of host 0; logs NAME --all shows the end of everybody's
# stop NAME         SIGTERM on every host: the run saves and ends; train again resumes it
# delete NAME       the VM or slice, with its disks
#
# --dry-run, right after the program's name, shows the gcloud commands without running them.
#
# With several hosts --out, --data.path and $ANISO_CACHE must lie on storage that all hosts mount
# (Filestore or another NFS). --resume is always added, so the same command starts and continues.
# Environment: PROJECT, ZONE (required); EXTRAS (packages of pyproject.toml, default tpu,data,kernels).
set -euo pipefail

# shellcheck source=tpu/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
HOME_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
EXTRAS=${EXTRAS:-tpu,data,kernels}

[[ ${1:-} != --help && $# -gt 0 ]] || { help && exit 0; }
if [[ $1 == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
COMMAND=${1:-} NAME=${2:-}
[[ $COMMAND =~ ^(create|setup|train|logs|stop|delete)$ ]] ||
  die 2 "unknown command '$COMMAND': create, setup, train, logs, stop or delete (see --help)"
[[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die 2 "$COMMAND needs the TPU's name, got '$NAME'"
shift 2
need PROJECT "the Google Cloud project"
need ZONE "a zone with TPUs, such as us-east5-a"
[[ -n $DRY_RUN ]] || have gcloud "see https://cloud.google.com/sdk/docs/install"

tpu() { # tpu VERB ARGUMENTS...
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$NAME" "--project=$PROJECT" "--zone=$ZONE" "$@"
}

everywhere() { tpu ssh --worker=all "--command=$1"; }

image_of() { # the VM image that Google names for a kind of TPU
  case $1 in
  v4-*) echo tpu-ubuntu2204-base ;;
  v5litepod-*) echo v2-alpha-tpuv5-lite ;;
  v5p-*) echo v2-alpha-tpuv5 ;;
  v6e-*) echo v2-alpha-tpuv6e ;;
  *) die 2 "no image is known for --type '$1': give --image" ;;
  esac
}

create() {
  local type="" image="" spot=()
  while [[ $# -gt 0 ]]; do
    case $1 in
    --type) type=${2:-} && shift ;;
    --image) image=${2:-} && shift ;;
    --spot) spot=(--spot) ;;
    *) die 2 "unknown option $1 of create" ;;
    esac
    shift
  done
  [[ -n $type ]] || die 2 "create needs --type, such as v5p-8"
  image=${image:-$(image_of "$type")} || exit 2
  tpu create "--accelerator-type=$type" "--version=$image" "${spot[@]}"
}

setup() {
  local archive
  git -C "$HOME_DIR" rev-parse 2>/dev/null || die 2 "$HOME_DIR is not a git checkout"
  archive=$(mktemp --suffix=.tgz)
  # shellcheck disable=SC2064  # the name of now
  trap "rm -f '$archive'" EXIT
  # What git tracks, as it lies here: uncommitted changes go along.
  git -C "$HOME_DIR" ls-files -z |
    (cd "$HOME_DIR" && tar --create --gzip --file "$archive" --null --files-from - --ignore-failed-read)
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:aniso.tgz" "--project=$PROJECT" \
    "--zone=$ZONE" --worker=all
  # The images have Python 3.10; uv brings 3.12.
  everywhere "set -e; mkdir -p aniso; tar xzf aniso.tgz -C aniso; cd aniso
python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[$EXTRAS]'"
}

train() {
  [[ $# -gt 0 ]] || die 2 "train needs a recipe (train.py --list-recipes shows them)"
  local words
  words=$(printf ' %q' "$@")
  setup
  everywhere "cd aniso
if [ -e train.pid ] && kill -0 \$(cat train.pid) 2>/dev/null; then
  echo 'a run is going on here: stop it first' >&2; exit 2
fi
ANISO_CLUSTER=tpu ANISO_COMMIT=$(commit "$HOME_DIR") nohup setsid .venv/bin/python \
scripts/train.py$words --resume > train.log 2>&1 < /dev/null &
echo \$! > train.pid"
  echo "started on every host of $NAME; $PROGRAM logs $NAME follows host 0"
}

logs() {
  if [[ ${1:-} == --all ]]; then
    everywhere "hostname; tail -n 20 aniso/train.log"
  else
    tpu ssh --worker=0 "--command=tail -n 100 -F aniso/train.log"
  fi
}

# shellcheck disable=SC2016  # the host expands it
stop() { everywhere 'kill -TERM $(cat aniso/train.pid)'; }

delete() { tpu delete --quiet; }

"$COMMAND" "$@"
