#!/usr/bin/env bash
# A SLURM of two nodes on this machine, for the tests; root only, with slurm-wlm and munge installed.
#     local_slurm.sh start DIR    writes DIR/slurm.conf, starts the daemons, waits until both nodes are idle
#     local_slurm.sh stop DIR     stops what start has started
# SLURM_CONF=DIR/slurm.conf then makes sbatch and the others use it.
set -euo pipefail
verb=$1 dir=$2
nodes=2
export SLURM_CONF=$dir/slurm.conf

# try_until COMMAND...: for up to 20 s.
try_until() {
    local attempt
    for attempt in {1..100}; do
        "$@" >/dev/null 2>&1 && return
        sleep 0.2
    done
    echo "local_slurm.sh: waited 20 s in vain for: $*; see $dir/*.log" >&2
    exit 1
}
all_idle() { [[ $(sinfo --noheader --states idle --format %D) == "$nodes" ]]; }

write_conf() {
    local host number
    host=$(hostname -s)
    cat <<CONF
ClusterName=fairseq_hash_tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$((base + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
JobRequeue=1
KillWait=60
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
    for number in $(seq "$nodes"); do
        echo "NodeName=n$number NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + 1 + number)) CPUs=2 RealMemory=1000"
    done
    echo "PartitionName=usual Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=120"
    echo "PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF"
}

start() {
    local number
    base=$((20000 + $$ % 10000))
    mkdir -p "$dir/state"
    write_conf >"$SLURM_CONF"
    # Tasks find each other by the names of their nodes.
    for number in $(seq "$nodes"); do
        grep -q "[[:space:]]n$number\$" /etc/hosts || echo "127.0.0.1 n$number" >>/etc/hosts
    done
    if ! munge --no-input >/dev/null 2>&1; then
        mkdir -p /run/munge
        chown munge: /run/munge
        runuser -u munge -- munged --force --pid-file /run/munge/munged.pid # also where a socket was left behind
        cp /run/munge/munged.pid "$dir/munged.pid"
    fi
    slurmctld
    try_until scontrol ping
    for number in $(seq "$nodes"); do slurmd -N "n$number"; done
    try_until all_idle
}

stop() {
    local file
    scancel --user root 2>/dev/null || true
    for file in "$dir"/n*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
        if [[ -f $file ]]; then kill "$(cat "$file")" 2>/dev/null || true; fi
    done
}

case $verb in
start) start ;;
stop) stop ;;
*) echo "local_slurm.sh: $verb is not known; use start or stop" >&2 && exit 2 ;;
esac
