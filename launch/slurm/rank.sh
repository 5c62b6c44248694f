#!/usr/bin/env bash
# One rank: what it prints goes to a file of its own, behind what earlier starts of the job have left there.
#     rank.sh FOLDER COMMAND...
set -euo pipefail
folder=$1 rank=${RANK:-${SLURM_PROCID:-0}}
shift
# The folder may be local to each node.
mkdir -p "$folder"
exec >>"$folder/rank-$rank.log" 2>&1
echo "== start ${SLURM_RESTART_COUNT:-0} of job ${SLURM_JOB_ID:-?}: rank $rank on ${HOSTNAME:-?}, $(date '+%F %T')"
export PYTHONUNBUFFERED=1
exec "$@"
