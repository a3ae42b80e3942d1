#!/usr/bin/env bash
# Set up .venv if needed, then run the demo. Arguments go to scripts/demo.py.
. "$(dirname "$0")/setup.sh"
exec "$VENV_PYTHON" "$PROJECT_ROOT/scripts/demo.py" "$@"
