#!/usr/bin/env bash
# Makes three hosts on this machine: "head", and the compute hosts "n1" and "n2".
#
# Each is a set of namespaces of its own (network, host name, mounts, processes, ipc):
#   * an address on a private bridge: head 10.77.0.1, n1 10.77.0.11, n2 10.77.0.12;
#   * its own /etc/hosts, /run and /dev/shm;
#   * its own process ids: the `pkill -f` of deepspeed's launcher reaches nothing outside, and with the host's process 1
#     everything on it ends;
#   * an sshd on port 22, with a key made for this run.
# The bridge is in head's network namespace: the machine's own network is untouched, and nothing goes out. The file
# system is shared, as NFS is on a cluster.
#
# Environment:
#   VC_RUN       directory of the state (/tmp/spt-cluster)
#   VC_SSH_PATH  PATH of commands that come by ssh (sshd's own)
#   VC_LIFELINE  number of an open file descriptor: the hosts end when it comes to its end, and so do not outlive who
#                holds the other side. Without it they stay until hosts_down.sh.
# Exit status: 0 they are up; 77 this machine can't; 1 a fault. Then `$VC_RUN/in HOST COMMAND...` runs a command.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export VC_RUN=${VC_RUN:-/tmp/spt-cluster}

skip() { echo "hosts_up: SKIP: $*" >&2; exit 77; }

[ "$(id -u)" = 0 ] || skip "not root"
for tool in ip unshare nsenter ssh ssh-keygen pdsh; do command -v $tool >/dev/null || skip "no $tool"; done
[ -x /usr/sbin/sshd ] || skip "no sshd"
unshare --net --uts --mount --pid --fork --ipc --mount-proc sh -c '
    ip link add br0 type bridge && ip link add ve0 type veth peer name ve1 && hostname x' 2>/dev/null ||
    skip "namespaces, bridges or veth pairs can't be made here"

[ ! -e "$VC_RUN" ] || "$here/hosts_down.sh"
up=
trap '[ -n "$up" ] || VC_KEEP=1 "$here/hosts_down.sh"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir -p "$VC_RUN/hosts" "$VC_RUN/ssh" "$VC_RUN/log"
VC_RUN=$(cd "$VC_RUN" && pwd)
cd "$VC_RUN"

cat >etc_hosts <<'HOSTS'
127.0.0.1 localhost
10.77.0.1 head
10.77.0.11 n1
10.77.0.12 n2
HOSTS
# Names come from that file alone: no query goes out, and no time-out of a resolver is waited for.
sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >nsswitch.conf

ssh-keygen -q -t ed25519 -N '' -C cluster -f ssh/id_ed25519
ssh-keygen -q -t ed25519 -N '' -C host -f ssh/host_key
cp ssh/id_ed25519.pub ssh/authorized_keys
echo "* $(cut -d' ' -f1,2 ssh/host_key.pub)" >ssh/known_hosts
cat >ssh/config <<CONFIG
Host *
    IdentityFile $VC_RUN/ssh/id_ed25519
    IdentitiesOnly yes
    UserKnownHostsFile $VC_RUN/ssh/known_hosts
    StrictHostKeyChecking yes
    BatchMode yes
    ConnectTimeout 5
    ServerAliveInterval 2
    ServerAliveCountMax 3
    LogLevel ERROR
CONFIG
cat >ssh/sshd_config <<CONFIG
Port 22
HostKey $VC_RUN/ssh/host_key
PidFile none
AuthorizedKeysFile $VC_RUN/ssh/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UseDNS no
PrintMotd no
PrintLastLog no
MaxStartups 100:30:200
MaxSessions 100
ClientAliveInterval 2
ClientAliveCountMax 3
CONFIG
[ -z "${VC_SSH_PATH:-}" ] || echo "SetEnv PATH=$VC_SSH_PATH" >>ssh/sshd_config
chmod 600 ssh/*

cat >in <<'IN'
#!/bin/sh
# in HOST COMMAND...: run a command on a host, in this directory and with this environment.
# nsenter forks: a signal to it does not reach the command. Bound it from inside: in n1 timeout -k 5 60 COMMAND
run=$(dirname "$0") host=$1
shift
exec nsenter -t "$(cut -d' ' -f1 "$run/hosts/$host.pid")" -m -u -i -n -p --wdns="$PWD" "$@"
IN
chmod 755 in
cp "$here/host_init.sh" init
for host in head n1 n2; do "$here/host_up.sh" $host; done
up=1
