#!/usr/bin/env bash
# Takes down what hosts_up.sh and slurm_up.sh made; may be run at any time, and twice.
#
# Only the hosts' first processes are killed. The kernel then kills all others of the host, and its network, links and
# mounts go with the last one. A first process is known by its number and the time of its start, or, where hosts_up.sh
# was interrupted before it wrote them, by being started as `$VC_RUN/init`.
# Environment: VC_RUN as in hosts_up.sh; VC_KEEP=1 keeps the directory, for the logs.
set -u
run=${VC_RUN:-/tmp/spt-cluster}
[ -d "$run" ] || exit 0
run=$(cd "$run" && pwd)

alive() { # NUMBER BORN: a zombie does not count
    local fields
    fields=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) || return 1
    [ "$(echo "$fields" | cut -d' ' -f1)" != Z ] && [ "$(echo "$fields" | cut -d' ' -f20)" = "$2" ]
}
first_processes() {
    local file number born
    for file in "$run"/hosts/*.pid; do
        [ -e "$file" ] && read -r number born <"$file" && alive "$number" "$born" && echo "$number"
    done
    # The pattern comes by a file: as an argument grep would find itself.
    grep -lzxFf <(printf '%s\n' "$run/init") /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3
}

for _ in $(seq 600); do
    left=$(first_processes | sort -u)
    [ -n "$left" ] || break
    # shellcheck disable=SC2086  # one argument a process
    kill -KILL $left 2>/dev/null
    sleep 0.05
done
[ -z "$left" ] || { echo "hosts_down: FAIL: still there: $left" >&2; exit 1; }
if [ "${VC_KEEP:-0}" = 1 ]; then rm -f "$run"/hosts/*; else rm -rf "$run"; fi
