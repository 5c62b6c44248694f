#!/usr/bin/env bash
# Process 1 of a host: sets it up, then collects orphans until it is killed or its lifeline ends.
# Arguments: the host's name, and the directory of the state.
set -e
name=$1 run=$2
hostname "$name"
mount --bind "$run/etc_hosts" /etc/hosts
mount --bind "$run/nsswitch.conf" /etc/nsswitch.conf
mount --bind "$run/ssh/config" /etc/ssh/ssh_config
[ ! -d /root/.ssh ] || mount -t tmpfs -o mode=700 tmpfs /root/.ssh # the machine's own settings would come first
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir -p /run/sshd /run/lock
ip link set lo up
: >"$run/hosts/$name.up"
if [ -n "${VC_LIFELINE:-}" ]; then
    while read -r -u "$VC_LIFELINE"; do :; done
    exit
fi
while :; do
    sleep 3600 &
    wait $!
done
