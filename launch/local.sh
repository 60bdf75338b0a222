#!/usr/bin/env bash
# Train in one process on this machine, on the accelerator that JAX finds. The scripts for clusters
# run this one on their machines. Or encode, likewise:
#
#   CONFIG=configs/emoji.py WORKDIR=runs/emoji launch/local.sh [--config.steps=100 ...]
#   COMMAND=encode OUT=features/image launch/local.sh --images=photos --encoder=dinov3-vitl16
#
# Resume: the same command goes on from the last checkpoint, or with the parts that are missing.
# SIGTERM, Ctrl-C and a lost terminal save and stop. Exit status: 0 done, for encode also where
# other processes have what is left; 75 stopped early, run it again; else of sotalign: 2 wrong
# input, 3 the loss is not finite.
#
# COMMAND   train or encode [train]
# CONFIG    config file, FILE.py or FILE.py:arg
# WORKDIR   directory of the run
# OUT       for encode, in place of these two: the feature store
# SOTALIGN  the command [sotalign]
# DRY_RUN=1 prints what would be run
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need "${needed[@]}"

command=("${SOTALIGN:-sotalign}" "${words[@]}" "$@")
if [[ -n ${DRY_RUN:-} ]]; then
  run "${command[@]}"
  exit
fi

stopped=
"${command[@]}" 3>&- &
child=$!
trap 'stopped=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
# A signal ends `wait`, not the child.
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
status=0
wait "$child" || status=$?

if [[ $COMMAND == train && $status == 0 && ! -f $result ]]; then
  status=75
elif [[ $status == 143 && -n $stopped ]]; then
  status=75 # ended by SIGTERM before it listened: nothing was begun yet
fi
exit "$status"
