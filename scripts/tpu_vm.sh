#!/usr/bin/env bash
# A pretraining run on TPU VM slices, from a laptop with gcloud: one command for all workers of all slices.
#   NAME=openvla ZONE=us-east5-a TYPE=v5p-128 scripts/tpu_vm.sh create
#   scripts/tpu_vm.sh wait | install REPOSITORY_URL [REVISION] | start ARGUMENTS OF run_host.sh | log | stop | delete
# Environment: NAME, ZONE, TYPE (v5p-128), SLICES (1), VERSION (of the TPU software), PROJECT, SPOT=1 for preemptible
# ones. DRY_RUN=1 prints the gcloud commands instead of running them.
set -euo pipefail
: "${NAME:?name of the queued resource}" "${ZONE:?its zone}"
slices=${SLICES:-1} here=$(dirname "$0")
common=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})

# The line is written at once: those of slices side by side stay apart.
do_it() { if [ -n "${DRY_RUN:-}" ]; then echo "$(printf '%q ' "$@")"; else "$@"; fi; }
nodes() { if [ "$slices" = 1 ]; then echo "$NAME"; else for ((i = 0; i < slices; i++)); do echo "$NAME-$i"; done; fi; }
everywhere() { # a command on every worker of every slice, slices side by side
    local jobs=() node
    for node in $(nodes); do
        do_it gcloud compute tpus tpu-vm ssh "$node" "${common[@]}" --worker all --command "$1" & jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
}

case ${1:-} in
create)
    case ${TYPE:?type of a slice, as v5p-128} in
    v4-*) version=tpu-ubuntu2204-base ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5*) version=v2-alpha-tpuv5-lite ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=${VERSION:?version of the TPU software for "$TYPE"} ;;
    esac
    if [ "$slices" = 1 ]; then who=(--node-id "$NAME"); else who=(--node-count "$slices" --node-prefix "$NAME"); fi
    do_it gcloud compute tpus queued-resources create "$NAME" "${common[@]}" "${who[@]}" --accelerator-type "$TYPE" \
        --runtime-version "${VERSION:-$version}" --scopes cloud-platform ${SPOT:+--spot}
    ;;
wait)
    until [ "$(gcloud compute tpus queued-resources describe "$NAME" "${common[@]}" --format='value(state.state)')" = ACTIVE ]
    do sleep 30; done
    ;;
install)
    shift
    for node in $(nodes); do
        do_it gcloud compute tpus tpu-vm scp "$here/setup_host.sh" "$node:" "${common[@]}" --worker all
    done
    everywhere "bash setup_host.sh $(printf '%q ' "$@")"
    ;;
start) # goes on when the connection ends; the output of each host is in its run.log
    shift
    everywhere "nohup openvla_jax/scripts/run_host.sh $(printf '%q ' "$@") > run.log 2>&1 < /dev/null & echo \$! > run.pid"
    ;;
log) do_it gcloud compute tpus tpu-vm ssh "$(nodes | head -n 1)" "${common[@]}" --worker 0 --command 'tail -n 50 -f run.log' ;;
stop) everywhere 'kill -TERM "$(cat run.pid)"' ;; # the run saves at a step that all hosts agree on
delete) do_it gcloud compute tpus queued-resources delete "$NAME" "${common[@]}" --force ;;
*) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
