#!/usr/bin/env bash
# Installs what the tests in this folder need, Debian's packages: SLURM with munge, sshd and pdsh, Open MPI.
# Only what is missing, and no daemon is started. Exit status 77 where it may not: no root, no apt, no network.
set -euo pipefail

skip() { echo "install: SKIP: $*" >&2; exit 77; }

[ "$(id -u)" = 0 ] || skip "not root"
command -v apt-get >/dev/null || skip "no apt-get"

wanted=()
{ command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null || wanted+=(slurm-wlm munge)
[ -x /usr/sbin/sshd ] || wanted+=(openssh-server openssh-client)
command -v pdsh >/dev/null || wanted+=(pdsh)
command -v ip >/dev/null || wanted+=(iproute2)
command -v mpirun >/dev/null || wanted+=(openmpi-bin)
[ ${#wanted[@]} -gt 0 ] || exit 0

# The packages' scripts would start munged, slurmd, and an sshd on port 22.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y --no-install-recommends "${wanted[@]}" >/dev/null 2>&1; }
install || { apt-get update >/dev/null 2>&1 && install; } || skip "apt-get install ${wanted[*]} failed"
