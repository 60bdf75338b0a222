#!/usr/bin/env bash
# Train or encode on TPUs of a GKE cluster, through xpk: one JobSet, a pod a host.
#
#   CLUSTER=mine WORKLOAD=emoji-1 TPU_TYPE=v5litepod-16 IMAGE=gcr.io/me/sotalign \
#     CONFIG=configs/emoji.py WORKDIR=/mnt/runs/emoji launch/gke_xpk.sh [--config.steps=100 ...]
#
# Resume: a pod that is told to go saves and ends with status 75, the JobSet restarts it, and it
# goes on from the last checkpoint; so does another workload with the same CONFIG and WORKDIR.
# WORKDIR must lie on storage that all pods mount (`xpk storage attach --auto-mount=true`). So must
# OUT, and there Filestore is needed: mounted buckets have no locks that other pods see.
#
# COMMAND       train or encode [train]
# CLUSTER       name of the xpk cluster, with ZONE and PROJECT if they are not gcloud's own
# WORKLOAD      name of the job, new each time
# TPU_TYPE      v5litepod-16, ...
# IMAGE         docker image with this checkout, the package and jax[tpu] installed
# CHECKOUT      where the checkout is in the image [/sotalign_jax]
# CONFIG        config file, from the checkout or absolute
# WORKDIR       directory of the run
# OUT           for encode, in place of these two: the feature store
# SLICES        how many [1]
# MAX_RESTARTS  preemptions to survive [50]
# GRACE         seconds to save in [120]
# DRY_RUN=1     prints what would be run
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need CLUSTER WORKLOAD TPU_TYPE IMAGE "${needed[@]}"

inside="cd $(quoted "${CHECKOUT:-/sotalign_jax}") && exec $(quoted env "${passed[@]}" \
  bash launch/local.sh "$@")"
run xpk workload create --cluster="$CLUSTER" --workload="$WORKLOAD" \
  ${ZONE:+--zone="$ZONE"} ${PROJECT:+--project="$PROJECT"} \
  --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --max-restarts="${MAX_RESTARTS:-50}" --restart-on-user-code-failure \
  --termination-grace-period-seconds="${GRACE:-120}" --command="$inside"
