#!/usr/bin/env bash
# Starts SLURM on the hosts of hosts_up.sh: the controller on head, a node daemon on n1 and on n2. They end with the
# hosts, so hosts_down.sh takes them down.
#
# Environment:
#   VC_RUN    as in hosts_up.sh; the hosts have to be up
#   VC_SLURM  directory of SLURM's state ($VC_RUN/slurm); its slurm.conf is what SLURM_CONF has to name
# Exit status: 0 it is up; 77 this machine can't; 1 a fault.
set -euo pipefail
run=$(cd "${VC_RUN:-/tmp/spt-cluster}" && pwd)
dir=${VC_SLURM:-$run/slurm}

skip() { echo "slurm_up: SKIP: $*" >&2; exit 77; }
die() { echo "slurm_up: FAIL: $*" >&2; tail -n 15 "$dir"/log/*.log >&2; exit 1; }

for tool in slurmctld slurmd sinfo munged; do command -v $tool >/dev/null || skip "no $tool"; done
mkdir -p "$dir"/{state,log,pid,dev,spool.n1,spool.n2}
dir=$(cd "$dir" && pwd)

cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/pid/slurmctld
SlurmdPidFile=$dir/pid/slurmd.%n
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
MailProg=/bin/true
# No cgroups, no pinning, no data base, no MPI.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
# The nodes are what the lines below say, whatever the machine is.
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=1000,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
# Short, so that tests see things happen.
KillWait=5
SlurmctldTimeout=10
# Above what ranks take to end that don't hear of each other.
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=3600
# Has to be above five times MessageTimeout, which is ten seconds: else a node may be drained whose controller was cut off.
UnkillableStepTimeout=180
GresTypes=gpu
SlurmctldPort=6817
SlurmdPort=6818
NodeName=n1 NodeAddr=10.77.0.11 CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeAddr=10.77.0.12 CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
# "high" preempts the others: jobs of "low" are requeued, those of "lowc" cancelled, both with time to end by themselves;
# those of "hasty" are cancelled after ten seconds.
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
PartitionName=lowc Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL GraceTime=90
PartitionName=hasty Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
CONF
echo "CgroupPlugin=autodetect" >"$dir/cgroup.conf"
# GPUs that aren't there: with device files SLURM sets CUDA_VISIBLE_DEVICES, so it gets two copies of /dev/null.
if mknod "$dir/dev/gpu0" c 1 3 && mknod "$dir/dev/gpu1" c 1 3; then
    echo "Name=gpu File=$dir/dev/gpu[0-1]" >"$dir/gres.conf"
else
    echo "Name=gpu Count=2" >"$dir/gres.conf"
fi
export SLURM_CONF=$dir/slurm.conf # without it each of SLURM's programs asks DNS first

(umask 077; head -c 128 /dev/urandom >"$dir/munge.key")
# A socket of the shared file system: one munged does for all hosts.
"$run/in" head munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --num-threads=2 \
    --pid-file="$dir/pid/munged" --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" \
    </dev/null >"$dir/log/munged.out" 2>&1 || die "munged: $(cat "$dir/log/munged.out")"
"$run/in" head slurmctld -c -i </dev/null >"$dir/log/slurmctld.out" 2>&1 ||
    die "slurmctld: $(cat "$dir/log/slurmctld.out")"
for name in n1 n2; do
    "$run/in" $name slurmd -N $name </dev/null >"$dir/log/slurmd.$name.out" 2>&1 ||
        die "slurmd: $(cat "$dir/log/slurmd.$name.out")"
done
for _ in $(seq 600); do
    idle=$("$run/in" head sinfo -h -N -p main -t idle -o %N 2>/dev/null | sort -u | wc -l)
    [ "$idle" = 2 ] && break
    sleep 0.1
done
[ "$idle" = 2 ] || die "nodes are not idle: $("$run/in" head sinfo -N -l 2>&1)"
"$run/in" head timeout 60 srun -Q -p main -N2 --ntasks-per-node=1 true || die "srun does not run"
