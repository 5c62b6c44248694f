#!/usr/bin/env bash
# Starts one host of hosts_up.sh: at the beginning, and again after its process 1 was killed.
# Argument: head, n1 or n2. Environment: VC_RUN and VC_LIFELINE, see hosts_up.sh.
set -euo pipefail
name=$1
run=$(cd "$VC_RUN" && pwd)

die() { echo "host_up: FAIL: $*" >&2; exit 1; }
# A process is known by its number and the time of its start.
born() { sed 's/.*) //' "/proc/$1/stat" | cut -d' ' -f20; }

rm -f "$run/hosts/$name".*
# A session of its own, and none of the caller's pipes.
setsid unshare --net --uts --mount --pid --ipc --fork --kill-child --mount-proc \
    "$run/init" "$name" "$run" </dev/null >"$run/log/$name.init.log" 2>&1 &
outside=$!
for _ in $(seq 1200); do [ -e "$run/hosts/$name.up" ] && break; sleep 0.05; done
[ -e "$run/hosts/$name.up" ] || die "$name: $(cat "$run/log/$name.init.log")"
inside=$(ps -o pid= --ppid $outside | head -1 | tr -d ' ')
[ -n "$inside" ] || die "$name: its process 1 can't be found"
echo "$inside $(born "$inside")" >"$run/hosts/$name.pid"

if [ "$name" = head ]; then
    "$run/in" head sh -c \
        "ip link add br0 type bridge forward_delay 0 && ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up"
else
    head=$(cut -d' ' -f1 "$run/hosts/head.pid")
    address=$(awk -v name="$name" '$2 == name {print $1}' "$run/etc_hosts")
    # With a host that was killed its pair of links goes, though not at once: the kernel clears name spaces away when it
    # has nothing else to do.
    for _ in $(seq 600); do "$run/in" head ip link show "v-$name" >/dev/null 2>&1 || break; sleep 0.05; done
    # A host that comes back has the hardware address that the others remember.
    ip link add name "v-$name" netns "$head" type veth \
        peer name eth0 netns "$inside" address "02:00:00:00:00:${address##*.}"
    "$run/in" head ip link set "v-$name" master br0 up
    "$run/in" "$name" sh -c "ip addr add $address/24 dev eth0 && ip link set eth0 up"
fi
"$run/in" "$name" /usr/sbin/sshd -f "$run/ssh/sshd_config" -E "$run/log/$name.sshd.log" ||
    die "$name: sshd: $(cat "$run/log/$name.sshd.log")"
for _ in $(seq 300); do
    [ "$("$run/in" head ssh "$name" hostname 2>"$run/log/ssh.log")" = "$name" ] && exit
    sleep 0.1
done
die "$name: no ssh: $(cat "$run/log/ssh.log" "$run/log/$name.sshd.log")"
