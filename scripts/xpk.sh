#!/bin/bash
# Train on TPU slices with XPK: `CLUSTER=anima TPU=v5p-256 SLICES=2 scripts/xpk.sh NAME IMAGE /work/pod.toml [FLAGS]`.
# The workload starts again, in the run folder NAME, if it was stopped on request (exit code 75, which XPK has to be told)
# or its machines were lost (XPK's own list), and ends after a mistake (2). Give the volume with the configuration, models,
# data and runs to the cluster first (`xpk storage create`).
set -euo pipefail
name=${1:?usage: scripts/xpk.sh NAME IMAGE CONFIG.toml [FLAGS]} image=${2:?IMAGE} config=${3:?CONFIG.toml}
shift 3
command=(anima-train --config "$config" --run_name "$name" --resume auto "$@")
# XPK passes the command to a shell: each word is quoted again, and `exec` lets SIGTERM reach the program.
xpk workload create --cluster "${CLUSTER:?}" --tpu-type "${TPU:?}" --num-slices "${SLICES:-1}" \
  --workload "$name" --docker-image "$image" \
  --max-restarts "${RESTARTS:-20}" --restart-on-exit-codes 75 --termination-grace-period-seconds 300 \
  --command "exec $(printf '%q ' "${command[@]}")"
