#!/usr/bin/env bash
# Both stages and samples on one host with GPUs: pre-train masked, fine-tune, draw.
#
#   launch/gpu_host.sh --pretrain=configs/pretrain_celebahq.py \
#       --finetune=configs/finetune_celebahq.py --workdir=runs/celebahq [--dry-run] \
#       [-- --config.FIELD=VALUE ...]
#
# Arguments after -- go to all three. The first run makes .venv and installs there; with
# PYTHON=/path/to/python the script uses that interpreter and installs nothing. A stage that ends
# with status 75 is started again; run again, the script resumes where it stopped. --dry-run prints
# the commands and runs none.
set -euo pipefail

# The comment above is the help text.
help() {
  sed -n '2,/^[^#]/{ s/^# \{0,1\}//p }' "$0"
  exit 0
}

fail() {
  echo "error: $*" >&2
  exit 2
}

pretrain='' finetune='' workdir='' dry_run=false
while [[ $# -gt 0 ]]; do
  case $1 in
    --pretrain=*) pretrain=${1#*=} ;;
    --finetune=*) finetune=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --dry-run) dry_run=true ;;
    -h | --help) help ;;
    --) shift && break ;;
    *) fail "unknown argument $1; expected one that --help lists; type launch/gpu_host.sh --help" ;;
  esac
  shift
done
[[ -n $workdir ]] || fail "--workdir is missing; type --workdir=FOLDER"
[[ $workdir == *://* ]] || workdir=$(realpath -m "$workdir")
cd "$(dirname "$0")/.."
# A config may be FILE.py:ARGUMENT.
[[ -f ${pretrain/.py:*/.py} ]] || fail "--pretrain is '$pretrain'; expected a file;" \
  "type --pretrain=configs/pretrain_celebahq.py, say"
[[ -f ${finetune/.py:*/.py} ]] || fail "--finetune is '$finetune'; expected a file;" \
  "type --finetune=configs/finetune_celebahq.py, say"

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

python=${PYTHON-.venv/bin/python}
if [[ -z ${PYTHON-} && ! -e .venv/.gpu ]]; then
  run python3 -m venv .venv
  run .venv/bin/pip install --quiet -c constraints.txt -e '.[gpu]'
  run touch .venv/.gpu
fi

stage() { run launch/keep_running.sh "$python" main.py "$@"; }

stage --config="$pretrain" --workdir="$workdir/pretrain" "$@"
stage --config="$finetune" --workdir="$workdir/finetune" \
  --config.init.path="$workdir/pretrain" "$@"
stage --config="$finetune" --workdir="$workdir/finetune" --mode=sample "$@"
