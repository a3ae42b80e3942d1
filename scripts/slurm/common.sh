# Shared by the SLURM scripts. A script sources this file first, after it has found the checkout. Afterwards
# CHECKOUT is the current folder, and `python` and `fairseq-hash` of its environment are on PATH.

say() { echo "$(basename "$SCRIPT"): $*"; }
fail() { say "$*" >&2; exit 2; }

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a job, not a program: sbatch [options of SLURM] $SCRIPT ..."
cd "$CHECKOUT"
if [[ -x .venv/bin/python ]]; then
    PATH=$CHECKOUT/.venv/bin:$PATH
fi
command -v python >/dev/null || fail "no .venv in $CHECKOUT and no python on PATH; run bash scripts/test.sh there once"
export PYTHONPATH=$CHECKOUT${PYTHONPATH:+:$PYTHONPATH} # without .venv the plugin is not installed

# The log of a batch job is a file, and a buffered line would be lost when the job is killed.
export PYTHONUNBUFFERED=1

# finish PID: wait for a child, and return its status. A trapped signal interrupts `wait`, not the child.
finish() {
    local status
    while :; do
        interrupted=
        status=0
        wait "$1" || status=$?
        [[ -n $interrupted ]] || return "$status"
    done
}
