#!/usr/bin/env bash
# Train in several processes on this machine that are told of each other by explicit settings: to
# try out what runs on several hosts, or with one GPU a process. Or encode, in processes that share
# the work:
#
#   PROCESSES=2 CONFIG=configs/emoji.py WORKDIR=runs/emoji \
#     launch/multiprocess.sh [--config.steps=100 ...]
#   PROCESSES=8 ONE_GPU_EACH=1 COMMAND=encode OUT=features/image \
#     launch/multiprocess.sh --images=photos --encoder=dinov3-vitl16 --workers=4
#
# Resume: the same command goes on. SIGTERM and Ctrl-C reach every process. When one fails, the
# others are told to stop, and killed after GRACE seconds; of encode they go on, and take over its
# work. Exit status: 0 done; 75 stopped early, run it again; else of the first process that failed.
#
# COMMAND    train or encode [train]
# PROCESSES  how many
# CONFIG     config file, FILE.py or FILE.py:arg
# WORKDIR    directory of the run
# OUT        for encode, in place of these two: the feature store
# LOGS       directory of process_0.log, process_1.log, ... [WORKDIR.logs, OUT.logs]
# PORT       of process 0 [a free one]
# GRACE      seconds [60]
# ONE_GPU_EACH=1  process i sees GPU i alone
# SOTALIGN   the command [sotalign]
# DRY_RUN=1  prints what would be run
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROCESSES "${needed[@]}"
[[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || {
  echo "${0##*/}: PROCESSES: must be a positive whole number, got '$PROCESSES'" >&2
  exit 2
}

logs=${LOGS:-${result%/*}.logs}
port=${PORT:-$((20000 + RANDOM % 10000))}
while [[ -z ${PORT:-} ]] && (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  port=$((20000 + RANDOM % 10000)) # somebody listened there
done
run mkdir -p "$logs"
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
children=()
for ((i = 0; i < PROCESSES; i++)); do
  told=(SOTALIGN_COORDINATOR="127.0.0.1:$port" SOTALIGN_NUM_PROCESSES="$PROCESSES"
    SOTALIGN_PROCESS_ID="$i" ${ONE_GPU_EACH:+JAX_LOCAL_DEVICE_IDS="$i"})
  [[ $COMMAND == train ]] || told=(${ONE_GPU_EACH:+CUDA_VISIBLE_DEVICES="${gpus[i]:-$i}"})
  command=(env "${told[@]}" "${SOTALIGN:-sotalign}" "${words[@]}" "$@")
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
failed=0 deadline=$((1 << 60))
while ((${#children[@]})); do
  for i in "${!children[@]}"; do
    if kill -0 "${children[i]}" 2>/dev/null; then continue; fi
    status=0
    wait "${children[i]}" || status=$?
    unset "children[i]"
    if ((status == 0 || failed)) || [[ $status == @(143|75) && -n $stopped ]]; then continue; fi
    echo "${0##*/}: process $i ended with status $status, see $logs/process_$i.log" >&2
    failed=$status
    [[ $COMMAND == train ]] || continue
    deadline=$((SECONDS + ${GRACE:-60}))
    tell TERM
  done
  if ((SECONDS >= deadline)); then tell KILL; fi
  sleep 0.2
done
# Without a signal, what is left of an encoding is in the hands of processes elsewhere.
if [[ $failed == 0 && ! -f $result && $COMMAND$stopped != encode ]]; then failed=75; fi
exit "$failed"
