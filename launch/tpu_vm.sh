#!/usr/bin/env bash
# Train (or encode) on a Cloud TPU: use the VM of this name or queue for one, install this checkout
# on all its workers, train there, and do it again after a preemption until the run is done.
#   TPU=mine ZONE=us-central2-b CONFIG=configs/emoji.py WORKDIR=/mnt/disk/emoji \
#     launch/tpu_vm.sh [--config.steps=100 ...]
# Resume: the same command goes on, on a new VM too. So WORKDIR or OUT must lie on storage that
# outlives the VM and that all its workers see; SETUP is where to mount it. Ctrl-C saves and stops.
#
# TPU               name of the VM, and of its queued resource
# ZONE              and, if it is not gcloud's own, PROJECT
# CONFIG            config file, in this checkout or on the VM
# WORKDIR           directory of the run, on the VM
# OUT               with COMMAND=encode, in place of these two: the feature store, on the VM
# ACCELERATOR_TYPE  to create the VM: v5litepod-16, ...
# RUNTIME_VERSION   to create the VM: v2-alpha-tpuv5-lite, ...
# SPOT=1            creates it as a spot VM
# SETUP             shell command for every worker, before the installation
# DRY_RUN=1         prints what would be run, once through
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need TPU ZONE "${needed[@]}"
trap 'exit 130' INT TERM

tpus() { run gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }
on() { tpus tpu-vm ssh "$TPU" --worker="$1" --command="$2" "${@:3}"; }
create() {
  need ACCELERATOR_TYPE RUNTIME_VERSION
  tpus queued-resources create "$TPU" --node-id="$TPU" ${SPOT:+--spot} \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION"
}

acquire() {
  while vm=$(tpus tpu-vm describe "$TPU" --format='value(state)' 2>/dev/null || true) &&
    [[ $vm != READY ]]; do
    queue=$(tpus queued-resources describe "$TPU" --format='value(state.state)' 2>/dev/null || true)
    case $queue:$vm in
      FAILED:* | SUSPENDED:*) tpus queued-resources delete "$TPU" --force --quiet ;; # preempted
      :PREEMPTED | :TERMINATED) tpus tpu-vm delete "$TPU" --quiet ;;
      :) [[ -n ${DRY_RUN:-} && -z ${ACCELERATOR_TYPE:-} ]] || create ;;
    esac
    [[ -z ${DRY_RUN:-} ]] || return 0
    echo "${0##*/}: VM ${vm:-absent}, queued resource ${queue:-absent}; looking again in 60 s"
    sleep 60
  done
}

bundle=$(mktemp -u).tar.gz
trap 'rm -f "$bundle"' EXIT
install() {
  run tar -czf "$bundle" -C "$(dirname "${BASH_SOURCE[0]}")/.." --exclude=.git --exclude=.venv \
    --exclude=runs . &&
    tpus tpu-vm scp "$bundle" "$TPU:sotalign_jax.tar.gz" --worker=all &&
    { [[ -z ${SETUP:-} ]] || on all "$SETUP"; } &&
    on all "mkdir -p sotalign_jax && tar -xzf sotalign_jax.tar.gz -C sotalign_jax &&\
 PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv && cd sotalign_jax &&\
 python3 -m uv venv -q --allow-existing --python 3.12 && python3 -m uv pip install -q '.$extras' 'jax[tpu]'"
}

# A terminal (-tt), so that the training hears of it when the connection ends.
train="rm -f sotalign.status; cd sotalign_jax; $(quoted env "${passed[@]}" \
  SOTALIGN=.venv/bin/sotalign bash launch/local.sh "$@"); echo \$? >../sotalign.status"
# A worker may be through with its parts of an encoding where another failed.
found="s=\$(cat sotalign.status); cd sotalign_jax;\
 [ \"\$s\" != 0 ] || [ -f $(quoted "$result") ] || s=75; echo \"\$s\""
for ((failures = 0; failures < 5; )); do
  acquire
  status=
  if ! install; then
    failures=$((failures + 1))
  elif failures=0 && on all "$train" --ssh-flag=-tt; then
    status=$(on 0 "$found" || true)
  fi
  if [[ -n ${DRY_RUN:-} || $status == 0 ]]; then exit 0; fi
  if [[ $status =~ ^[0-9]+$ && $status != 75 ]]; then exit "$status"; fi # as of wrong input
  echo "${0##*/}: not done yet; again in 30 s"
  sleep 30
done
echo "${0##*/}: the installation failed five times" >&2
exit 1
