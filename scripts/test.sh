#!/usr/bin/env bash
# Set up .venv if needed, then lint, check types and test (which looks at the rooms' imports, too). Arguments go to pytest: bash scripts/test.sh -k router
. "$(dirname "$0")/setup.sh"
cd "$PROJECT_ROOT" || exit 1

status=0
"$VENV_PYTHON" -m ruff check || status=1
"$VENV_PYTHON" -m ruff format --check || status=1
"$VENV_PYTHON" -m mypy || status=1
# Last, so that pytest's summary is the last line.
"$VENV_PYTHON" -m pytest "$@" || status=$?
exit "$status"
