#!/usr/bin/env bash
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
# Prepare data with as many processes as the job has CPUs (docs/data.md, docs/slurm.md):
#     sbatch --cpus-per-task 32 scripts/slurm/prepare.sh cc100-en --vocab-size 51200 --out data/cc100
set -euo pipefail
SCRIPT=scripts/slurm/prepare.sh
CHECKOUT=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $CHECKOUT/scripts/slurm/common.sh ]]; then
    echo "prepare.sh: $CHECKOUT is no checkout of fairseq_hash; submit in one: cd CHECKOUT && sbatch $SCRIPT ..." >&2
    exit 2
fi
. "$CHECKOUT/scripts/slurm/common.sh"

(($# > 0)) || fail "no corpus given: sbatch $SCRIPT CORPUS --out DIR ... (docs/data.md)"
workers=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
[[ " $*" == *" --workers"* ]] || set -- "$@" --workers "$workers"
exec python -m data_prep "$@"
