#!/usr/bin/env bash
# A run on a Cloud TPU slice, from creating the slice to deleting it.
#
#   launch/tpu_pod.sh create  --name=maskdm --zone=us-west4-a --type=v5litepod-16 \
#       [--spot] [--queued]
#   launch/tpu_pod.sh install --name=maskdm --zone=us-west4-a
#   launch/tpu_pod.sh start   --name=maskdm --zone=us-west4-a -- \
#       --config=configs/pretrain_celebahq.py --workdir=gs://BUCKET/W1 \
#       --config.data.dir=gs://BUCKET/tfds
#   launch/tpu_pod.sh logs    --name=maskdm --zone=us-west4-a
#   launch/tpu_pod.sh stop    --name=maskdm --zone=us-west4-a
#   launch/tpu_pod.sh delete  --name=maskdm --zone=us-west4-a [--queued]
#
# create   creates the slice; --queued waits in Google's queue until one is free, --version replaces
#          the type's default image
# install  copies this checkout's code and configs to every worker, and makes a virtual environment;
#          with --nfs=10.0.0.2:/share also mounts that share (Filestore, say) at /mnt/maskdm, for a
#          workdir and data that do not lie in a bucket
# start    runs main.py on every worker, in the background, with the arguments after --; starts it
#          again after a preemption (status 75), and up to 10 times after a worker dies
# logs     follows process 0's output;  stop  saves and ends;  delete  gives the slice back
#
# --project=ID goes to gcloud; --dry-run, with any action, prints the commands and runs none.
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

action=${1-}
case $action in
  create | install | start | logs | stop | delete) shift ;;
  -h | --help) help ;;
  *)
    fail "the action is '$action'; expected create, install, start, logs, stop or delete;" \
      "type launch/tpu_pod.sh create --name=NAME --zone=ZONE --type=v5litepod-16, say"
    ;;
esac
name='' zone='' type='' version='' nfs='' project=() spot=() queued=false dry_run=false
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --project=*) project=("$1") ;;
    --name | --zone | --type | --version | --nfs | --project)
      [[ ${2-} != -* ]] || fail "$1 has no value; expected one; type $1=VALUE"
      set -- "$1=${2-}" "${@:3}" && continue
      ;;
    --spot) spot=(--spot) ;;
    --queued) queued=true ;;
    --dry-run) dry_run=true ;;
    -h | --help) help ;;
    --) shift && break ;;
    *) fail "unknown argument $1; expected one that --help lists; type launch/tpu_pod.sh --help" ;;
  esac
  shift
done
[[ -n $name && -n $zone ]] || fail "--name or --zone is missing; type --name=NAME --zone=ZONE"

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

where=(--zone="$zone" "${project[@]}")

# on WORKER COMMAND: runs a shell command on one worker, or on "all".
on() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }

image() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "--type is '$type'; expected a type whose image is known here;" \
      "type --type=v5litepod-16, say, or also --version=IMAGE" ;;
  esac
}

create() {
  [[ -n $type ]] || fail "--type is missing; type --type=v5litepod-16, say"
  [[ -n $version ]] || version=$(image) || exit 2
  if $queued; then
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
      --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
  else
    run gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
      --accelerator-type="$type" --version="$version" "${spot[@]}"
  fi
}

install() {
  [[ -z $nfs || $nfs == *:/* ]] ||
    fail "--nfs is '$nfs'; expected a share; type --nfs=10.0.0.2:/share, say"
  local archive=${TMPDIR-/tmp}/maskdm_jax.tar.gz
  # Listed by name, since a checkout may also hold runs and data.
  run tar --create --gzip --file="$archive" --directory="$(realpath "$(dirname "$0")/..")" \
    --exclude=__pycache__ main.py maskdm_jax configs launch README.md setup.py pyproject.toml \
    constraints.txt
  run gcloud compute tpus tpu-vm scp "$archive" "$name:maskdm_jax.tar.gz" "${where[@]}" --worker=all
  local packages=python3.11-venv mount=()
  if [[ -n $nfs ]]; then
    packages+=' nfs-common'
    mount=(
      'sudo mkdir -p /mnt/maskdm'
      "{ mountpoint -q /mnt/maskdm || sudo mount -t nfs $(printf %q "$nfs") /mnt/maskdm; }"
      'sudo chmod a+rwx /mnt/maskdm'
    )
  fi
  local steps=(
    # The images' own Python is older than 3.11.
    'sudo add-apt-repository --yes ppa:deadsnakes/ppa'
    "sudo apt-get install --yes --quiet $packages"
    "${mount[@]}"
    'mkdir -p maskdm_jax'
    'tar --extract --gzip --file=maskdm_jax.tar.gz --directory=maskdm_jax'
    'cd maskdm_jax'
    'python3.11 -m venv .venv'
    ".venv/bin/pip install --quiet -c constraints.txt -e '.[tpu]'"
  )
  local command
  command=$(printf '%s && ' "${steps[@]}")
  on all "${command% && }"
}

start() {
  [[ " $*" == *" --config="* && " $*" == *" --workdir="* ]] ||
    fail "main.py's arguments are missing; type -- --config=configs/NAME.py --workdir=gs://BUCKET/W"
  on all "cd maskdm_jax && { nohup launch/keep_running.sh --restarts=10 .venv/bin/python main.py$(
    printf ' %q' "$@"
  ) > ~/maskdm.log 2>&1 < /dev/null & echo \$! > ~/maskdm.pid; }"
}

case $action in
  create) create ;;
  install) install ;;
  start) start "$@" ;;
  logs) on 0 'tail --lines=100 --follow=name ~/maskdm.log' ;;
  stop) on all "xargs kill < ~/maskdm.pid" ;; # SIGTERM: main.py saves, and is not started again
  delete)
    if $queued; then
      run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    else
      run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    fi
    ;;
esac
