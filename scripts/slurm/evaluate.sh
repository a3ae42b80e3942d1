#!/usr/bin/env bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
# Evaluate trained runs on their valid and test data, on one GPU or the CPU (docs/slurm.md):
#     sbatch --gpus 1 scripts/slurm/evaluate.sh runs/laptop/hash/seed1 ...
set -euo pipefail
SCRIPT=scripts/slurm/evaluate.sh
CHECKOUT=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $CHECKOUT/scripts/slurm/common.sh ]]; then
    echo "evaluate.sh: $CHECKOUT is no checkout of fairseq_hash; submit in one: cd CHECKOUT && sbatch $SCRIPT ..." >&2
    exit 2
fi
. "$CHECKOUT/scripts/slurm/common.sh"

(($# > 0)) || fail "no run folder given: sbatch $SCRIPT RUN..."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}}
exec fairseq-hash evaluate "$@"
