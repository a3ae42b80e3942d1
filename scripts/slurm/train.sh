#!/usr/bin/env bash
#SBATCH --job-name=train
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Train on the nodes of the allocation, one task per GPU; continue the last start of this run (docs/slurm.md):
#     sbatch --nodes 4 --gpus-per-node 8 scripts/slurm/train.sh --config-name reddit/hash_1x64 [hydra overrides]
# Without GPUs, run one CPU task for each task asked for:
#     sbatch --nodes 2 --ntasks-per-node 1 --cpus-per-task 8 scripts/slurm/train.sh --config-name laptop/hash
set -euo pipefail
SCRIPT=scripts/slurm/train.sh
CHECKOUT=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $CHECKOUT/scripts/slurm/common.sh ]]; then
    echo "train.sh: $CHECKOUT is no checkout of fairseq_hash; submit in one: cd CHECKOUT && sbatch $SCRIPT ..." >&2
    exit 2
fi
. "$CHECKOUT/scripts/slurm/common.sh"

readonly STOPPED=75 # fairseq_hash.training.stop_signals.EXIT_STATUS: saved, the same command goes on

# This shell gets the signals, and passes them to the tasks through their srun.
stop='' step='' interrupted=''
note() {
    interrupted=yes
    stop=${stop:-$1}
    say "SIG$1: the tasks save and stop"
    [[ -z $step ]] || kill -s "$1" "$step" 2>/dev/null || true
}
trap 'note USR1' USR1
trap 'note TERM' TERM

# Whether the job should continue later: SLURM wants its nodes back, but no user has cancelled it.
is_to_go_on() {
    # At preemption with a GraceTime the tasks get SIGTERM, and this shell gets nothing.
    [[ $stop == USR1 ]] || scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'
}

requeue() {
    say "back into the queue: $1"
    trap '' USR1
    trap - TERM # SLURM ends this shell with it
    scontrol requeue "$SLURM_JOB_ID" || fail "SLURM does not requeue job $SLURM_JOB_ID; submit it again, it goes on where it was"
    sleep 60
    exit "$STOPPED"
}

# The number of tasks, on GPUs or CPUs.
arguments=("$@")
[[ " $*" == *" --config-dir"* || " $*" == *" -cd"* ]] || arguments=(--config-dir configs "$@")
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus > 0)); then
    tasks=$((gpus * SLURM_JOB_NUM_NODES))
    layout=(--ntasks "$tasks" --ntasks-per-node "$gpus" --gpu-bind none)
else
    # Count per node if that was asked for: SLURM_NTASKS does not change when a waiting job gets another number of nodes.
    each=${SLURM_NTASKS_PER_NODE:-}
    tasks=$((each ? each * SLURM_JOB_NUM_NODES : ${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}))
    layout=(--ntasks "$tasks" ${each:+--ntasks-per-node "$each"})
    [[ " $*" == *" cluster="* ]] || arguments+=(cluster=cpu)
fi
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || layout+=(--cpus-per-task "$SLURM_CPUS_PER_TASK")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# Check first: what would fail on all nodes fails here, in one line.
fairseq-hash plan "${arguments[@]}" --ranks "$tasks" --check &
finish $! || exit 1
folder=$(fairseq-hash plan "${arguments[@]}" --ranks "$tasks" --run-dir)
mkdir -p "$folder/slurm"
this=$folder/slurm/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
python scripts/slurm/record.py "$tasks" "${arguments[@]}" >"$this.json"
if [[ -n $stop ]]; then
    is_to_go_on && requeue "the signal came before the tasks were started"
    exit "$STOPPED"
fi

# Rendezvous by env://, which fairseq prefers if it finds these variables.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$tasks
say "$tasks tasks on $SLURM_JOB_NODELIST; run folder $folder; start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID"
srun "${layout[@]}" --kill-on-bad-exit=1 --output "$this-%t.out" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec python -m fairseq_cli.hydra_train "$@"' \
    task "${arguments[@]}" &
step=$!
[[ -z $stop ]] || kill -s "$stop" "$step" 2>/dev/null || true

status=0
finish "$step" || status=$?
case $status in
0) say "done" ;;
"$STOPPED")
    say "$(grep -h -o 'stopped by .*' "$this-0.out" | tail -n 1)"
    if is_to_go_on; then requeue "it goes on from there"; fi
    ;;
*)
    # Above 128, a signal ended a task: before training had begun, or because it was SLURM's last signal.
    if ((status > 128)) && is_to_go_on; then requeue "a signal ended a task before it could save (status $status)"; fi
    say "failed with status $status; see $this-*.out" >&2
    ;;
esac
exit "$status"
