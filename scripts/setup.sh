# The set-up that the scripts share. A script sources it as its first step:
#     . "$(dirname "$0")/setup.sh"
# It creates the environment in .venv, or creates it anew, if needed (scripts/setup_env.py). Then it sets PROJECT_ROOT and
# VENV_PYTHON. If the set-up fails, it ends the script. docs/install.md lists the variables that you can set.
PROJECT_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || exit 1
VENV_PYTHON=$PROJECT_ROOT/.venv/bin/python

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" && echo "$PYTHON" && return
        echo "setup: PYTHON=$PYTHON is not a Python 3.10 to 3.13 that runs; set it to one, or unset it" >&2
        return 1
    fi
    # Run each one, not only look it up: a version manager's stub is on PATH even if it has no such Python.
    for candidate in python3 python3.11 python3.12 python3.13 python3.10; do
        is_supported "$candidate" && echo "$candidate" && return
    done
    echo "setup: found no Python 3.10 to 3.13 on PATH; install one, or set PYTHON to the path of one" >&2
    return 1
}

base_python=$(find_python) || exit 1
if ! mkdir -p "$PROJECT_ROOT/.venv" || ! : >>"$PROJECT_ROOT/.venv/in-use"; then
    echo "setup: cannot write to $PROJECT_ROOT/.venv; make it a folder that you can write to, or delete it" >&2
    exit 1
fi
# The open file holds a lock as long as the script or a process that it started runs, so no other set-up replaces .venv.
exec 9>>"$PROJECT_ROOT/.venv/in-use"
"$base_python" "$PROJECT_ROOT/scripts/setup_env.py" --in-use 9 || exit 1
