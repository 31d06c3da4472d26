#!/usr/bin/env bash
# Runs a training command on this host until it is done; start it on every host with the same arguments.
#   run_host.sh train.py --config configs/openvla_7b.py:v5p-128 --workdir gs://BUCKET/run ...
# 0 (done) and 2 (bad input, which no new start mends) end it. Anything else, a host that was lost, a crash, storage that
# failed, is started again: all hosts come together and go on from the last checkpoint. SIGTERM is passed on: the run
# saves, exits with 143, and is not started again.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
pause=${RESTART_SECONDS:-15} limit=${RESTARTS:-1000} stopped=
child=
trap 'stopped=1; [ -n "$child" ] && kill -TERM "$child"' TERM INT
for ((start = 0; start <= limit; start++)); do
    "$python" "$@" &
    child=$!
    wait "$child"; code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done # a signal ends wait, not the child
    echo "run_host: ended with $code on $(hostname) at $(date -u +%FT%TZ)" >&2
    if [ -n "$stopped" ] || [ "$code" = 0 ] || [ "$code" = 2 ]; then exit "$code"; fi
    sleep "$pause"
done
echo "run_host: $limit restarts are used up" >&2
exit "$code"
