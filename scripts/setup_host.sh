#!/usr/bin/env bash
# Installs openvla_jax on one host of a TPU slice; run on every worker (scripts/tpu_vm.sh install does).
#   setup_host.sh REPOSITORY_URL [REVISION]
set -euo pipefail
repository=${1:?usage: setup_host.sh REPOSITORY_URL [REVISION]}
revision=${2:-HEAD}
cd "$HOME"
[ -d openvla_jax ] || git clone "$repository" openvla_jax
cd openvla_jax
git fetch origin
git checkout --detach "$(git rev-parse --verify --quiet "origin/$revision" || echo "$revision")"
# TPU VM images come with Python 3.10; uv brings the 3.11 that the constraints were tested on.
command -v uv >/dev/null || python3 -m pip install --user --quiet uv
export PATH="$HOME/.local/bin:$PATH"
[ -x .venv/bin/python ] || uv venv --quiet --seed --python 3.11 .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,tpu]'
# Larger pages for the host's memory: TPU runtimes of v5e and newer start and stop faster with them.
echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
git log -1 --format='%H %s'
