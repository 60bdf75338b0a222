#!/usr/bin/env bash
# Train in several processes on this machine that are told of each other by explicit settings: to
# try out what runs on several hosts, or with one GPU a process.
#
#   PROCESSES=2 CONFIG=configs/emoji.py WORKDIR=runs/emoji \
#     launch/multiprocess.sh [--config.steps=100 ...]
#
# Resume: the same command goes on from the last checkpoint. SIGTERM and Ctrl-C reach every process.
# When one fails, the others are told to stop, and killed after GRACE seconds. Exit status: 0 done;
# 75 stopped early, run it again; else that of the first process that failed.
#
# PROCESSES  how many
# CONFIG     config file, FILE.py or FILE.py:arg
# WORKDIR    directory of the run
# LOGS       directory of process_0.log, process_1.log, ... [WORKDIR.logs]
# PORT       of process 0 [a free one]
# GRACE      seconds [60]
# ONE_GPU_EACH=1  process i sees GPU i alone
# SOTALIGN   the command [sotalign]
# DRY_RUN=1  prints what would be run
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROCESSES CONFIG WORKDIR
[[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || {
  echo "${0##*/}: PROCESSES: must be a positive whole number, got '$PROCESSES'" >&2
  exit 2
}

logs=${LOGS:-$WORKDIR.logs}
port=${PORT:-$((20000 + RANDOM % 10000))}
while [[ -z ${PORT:-} ]] && (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  port=$((20000 + RANDOM % 10000)) # somebody listened there
done
run mkdir -p "$logs"
children=()
for ((i = 0; i < PROCESSES; i++)); do
  command=(env SOTALIGN_COORDINATOR="127.0.0.1:$port" SOTALIGN_NUM_PROCESSES="$PROCESSES"
    SOTALIGN_PROCESS_ID="$i" ${ONE_GPU_EACH:+JAX_LOCAL_DEVICE_IDS="$i"}
    "${SOTALIGN:-sotalign}" train --config="$CONFIG" --workdir="$WORKDIR" "$@")
  if [[ -n ${DRY_RUN:-} ]]; then
    echo "$(quoted "${command[@]}") >>$(quoted "$logs/process_$i.log") 2>&1 &"
  else
    "${command[@]}" >>"$logs/process_$i.log" 2>&1 3>&- &
    children+=("$!")
  fi
done
[[ -z ${DRY_RUN:-} ]] || exit 0

tell() { for child in "${children[@]}"; do kill "-$1" "$child" 2>/dev/null || true; done; }
stopped=
trap 'stopped=yes; tell TERM' TERM INT HUP
failed=0
while ((${#children[@]})); do
  for i in "${!children[@]}"; do
    if kill -0 "${children[i]}" 2>/dev/null; then continue; fi
    status=0
    wait "${children[i]}" || status=$?
    unset "children[i]"
    if ((status == 0 || failed)) || [[ $status == 143 && -n $stopped ]]; then continue; fi
    echo "${0##*/}: process $i ended with status $status, see $logs/process_$i.log" >&2
    failed=$status
    deadline=$((SECONDS + ${GRACE:-60}))
    tell TERM
  done
  if ((failed && SECONDS >= deadline)); then tell KILL; fi
  sleep 0.2
done
if [[ $failed == 0 && ! -f $WORKDIR/results.json ]]; then failed=75; fi
exit "$failed"
