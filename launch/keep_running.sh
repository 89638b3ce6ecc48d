#!/usr/bin/env bash
# Runs a command, and runs it again if it ends with status 75: "saved; start me again".
#
#   launch/keep_running.sh [--restarts=N] COMMAND [ARGUMENT ...]
#
# N: how often to run it again after other failures (a host that died, say); default 0. After status
# 1 or 2 a person has to act, and it is never run again. SIGTERM and Ctrl-C are passed on as
# SIGTERM, and it is not run again.
set -uo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
  sed -n '2,/^[^#]/{ s/^# \{0,1\}//p }' "$0"
  exit 0
fi
restarts=0
if [[ ${1-} == --restarts=* ]]; then
  restarts=${1#*=}
  shift
fi
if [[ $# -eq 0 || $1 == -* || ! $restarts =~ ^[0-9]+$ ]]; then
  echo "error: --restarts is '$restarts' and the command '$*'; expected a whole number and a" \
    "command; type launch/keep_running.sh --restarts=10 COMMAND ..." >&2
  exit 2
fi

child=0
stopping=false
trap 'stopping=true; [[ $child -gt 0 ]] && kill -TERM "$child" 2>/dev/null' TERM INT

while true; do
  "$@" &
  child=$!
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the command ends
    wait "$child"
    status=$?
  done
  if [[ $status -le 2 ]] || $stopping; then
    exit "$status"
  elif [[ $status -ne 75 ]]; then
    [[ $restarts -gt 0 ]] || exit "$status"
    restarts=$((restarts - 1))
  fi
  echo "ended with status $status; starting again" >&2
  sleep "${RESTART_PAUSE_S-5}"
  ! $stopping || exit "$status"
done
