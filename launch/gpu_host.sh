#!/usr/bin/env bash
# Both stages and samples on one host with GPUs: pre-train masked, fine-tune, draw.
#
#   launch/gpu_host.sh --pretrain=configs/pretrain_celebahq.py \
#       --finetune=configs/finetune_celebahq.py --workdir=runs/celebahq [--dry-run] \
#       [-- --config.FIELD=VALUE ...]
#
# Configs are named as for main.py. Arguments after -- go to all three. The first run makes .venv in
# the checkout and installs there; with PYTHON=/path/to/python the script uses that interpreter and
# installs nothing. A stage that ends with status 75 is started again; run again, the script resumes
# where it stopped. --dry-run prints the commands and runs none.
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
    --pretrain | --finetune | --workdir)
      [[ ${2-} != -* ]] || fail "$1 has no value; expected one; type $1=VALUE"
      set -- "$1=${2-}" "${@:3}" && continue
      ;;
    --dry-run) dry_run=true ;;
    -h | --help) help ;;
    --) shift && break ;;
    *) fail "unknown argument $1; expected one that --help lists; type launch/gpu_host.sh --help" ;;
  esac
  shift
done
[[ -n $workdir ]] || fail "--workdir is missing; type --workdir=FOLDER"
[[ $workdir == *://* || $workdir == "~"* ]] || workdir=$(realpath -m -- "$workdir")
root=$(realpath -s "$(dirname "$0")/..")

# check FLAG CONFIG: a file, FILE.py:ARGUMENT, or one of configs/ by its path or name.
check() {
  local file=${2/.py:*/.py}
  [[ -f ${file/#\~/$HOME} || ($file == configs/* && -f $root/$file) ||
    -f $root/configs/${2%%:*}.py ]] || fail "$1 is '$2'; expected a file, or the name of one in" \
    "configs/; type $1=configs/${1#--}_celebahq.py, say"
}
check --pretrain "$pretrain"
check --finetune "$finetune"

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

python=${PYTHON:-$root/.venv/bin/python}
if [[ -n ${PYTHON-} ]]; then
  command -v "$PYTHON" > /dev/null || fail "PYTHON is '$PYTHON', which is no program; expected a" \
    "Python that has the package; type PYTHON=/path/to/python before the command, or PYTHON="
elif [[ ! -e $root/.venv/.gpu ]]; then
  run python3 -m venv "$root/.venv"
  run "$python" -m pip install --quiet -c "$root/constraints.txt" -e "${root}[gpu]"
  run touch "$root/.venv/.gpu"
fi

stage() { run "$root/launch/keep_running.sh" "$python" "$root/main.py" "$@"; }

stage --config="$pretrain" --workdir="$workdir/pretrain" "$@"
stage --config="$finetune" --workdir="$workdir/finetune" \
  --config.init.path="$workdir/pretrain" "$@"
stage --config="$finetune" --workdir="$workdir/finetune" --mode=sample "$@"
