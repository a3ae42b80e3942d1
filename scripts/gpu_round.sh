#!/usr/bin/env bash
# All checks and benchmarks for one GPU, in one call of at most nine minutes (docs/gpu.md):
#   bash scripts/gpu_round.sh OUT [--device cpu] [--stages NAME ...]    write results into OUT as they come
#   bash scripts/gpu_round.sh --prepare [--text DIR]                    first, on a machine with a network: fill .gpu
# On a GPU machine it uses that machine's python3 and torch, and the wheels in .gpu/wheels; elsewhere the set-up's .venv.
set -u
root=$(cd "$(dirname "$0")/.." && pwd -P)
if [ "${1:-}" = --prepare ]; then
    . "$root/scripts/setup.sh"
    exec "$VENV_PYTHON" "$root/scripts/gpu_prepare.py" "${@:2}"
fi
python=$root/.venv/bin/python
if [ ! -x "$python" ]; then
    python=$(command -v python3) || { echo "gpu_round: no python3 on PATH" >&2; exit 1; }
    if ! ls "$root"/.gpu/wheels/*.whl >/dev/null 2>&1; then
        echo "gpu_round: no wheels in .gpu/wheels; run bash scripts/gpu_round.sh --prepare on a machine with a network, and copy .gpu here" >&2
        exit 1
    fi
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$root"/.gpu/wheels/*.whl || exit 1
    export PYTHONPATH=$site:$root
fi
"$python" "$root/scripts/gpu_round.py" "$@"
