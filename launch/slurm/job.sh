# What the job scripts share: starting the ranks, passing the notice of the end on to them, and deciding whether the
# job goes back into the queue. Sourced by the batch script, on the first node.
#
# Variables, all of them optional:
#     SPT_SITE      instead of launch/slurm/site.sh
#     SPT_LAUNCHER  srun (one task a rank) or torchrun (one agent a node)
#     SPT_RESTARTS  how often a job may go back into the queue (100)
#     SPT_NOTICE    seconds of --signal=B:USR1@SECONDS (120)
#     SPT_LOGS      folder for the ranks' logs, instead of slurm/ where the run writes
#     SPT_FOLDER, SPT_MEMBERS  where the run writes, and the tasks of a suite, one in a line; launch/submit.py writes
#                   them into the scripts that it makes, and the others ask it

set -euo pipefail

SPT_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
LAUNCHER=${SPT_LAUNCHER:-srun}
MOST_RESTARTS=${SPT_RESTARTS:-100}
NOTICE_SECONDS=${SPT_NOTICE:-120}
# SLURM may send it so much earlier.
NOTICE_SLACK=60
# As spt_dist/exits.py has them.
USER_ERROR=2 STOPPED=75
SECONDS_BETWEEN_NOTICES=10
SECONDS_FOR_CONTROLLER=300
LAST_LINES=15

# The notice of the end, as --signal=B:USR1@SECONDS has it; and the end, which the ranks hear too. A trap sets a flag
# and nothing else, for bash may be in the middle of a command.
NOTICE=
trap 'NOTICE=1' USR1
trap : TERM

say() { echo "$(date '+%F %T') job $JOB: $*"; }

# One line, and the status of a user's mistake.
die() { echo "error: $*" >&2; exit "$USER_ERROR"; }

# ---- the job --------------------------------------------------------------------------------

# Set SHOWN, and from it JOB (how scontrol calls this job), RESTARTS, ARRAY_TASK, TASKS (of a node) and CPUS (of a
# task). Of the environment only SLURM_JOB_ID and the nodes are surely this job's: one that was submitted from inside
# another has the other's variables wherever SLURM sets none.
know_job() {
    local array tasks
    [ -n "${SLURM_JOB_ID:-}" ] || die "this is a job script: sbatch launch/slurm/${0##*/} CONFIG"
    SHOWN=$(show_job)
    [ -n "$SHOWN" ] || { echo "error: SLURM's controller does not answer; submit the job again" >&2; exit 1; }
    # A task of an array has a job id of its own, but for the last one, whose id stands for the whole array.
    array=$(field ArrayJobId) ARRAY_TASK=$(field ArrayTaskId) RESTARTS=$(field Restarts)
    JOB=${array:+${array}_$ARRAY_TASK}
    JOB=${JOB:-$SLURM_JOB_ID}
    tasks=$(field NumTasks) TASKS=$(field NtasksPerN:B:S:C) CPUS=$(field CPUs/Task)
    TASKS=${TASKS%%:*}
    [ "${TASKS:-0}" != 0 ] || TASKS=$((${tasks:-1} / ${SLURM_JOB_NUM_NODES:-1}))
    [ "$TASKS" != 0 ] || TASKS=1
    CPUS=${CPUS:-1}
    # For the site's file and for the ranks.
    export SLURM_RESTART_COUNT=$RESTARTS
    unset SLURM_CPUS_PER_TASK
    [ "$CPUS" = 1 ] || export SLURM_CPUS_PER_TASK=$CPUS
}

# What SLURM knows of this job, in one line; "" where the controller does not answer.
show_job() {
    local until=$((SECONDS + SECONDS_FOR_CONTROLLER)) shown
    # One id may stand for all tasks of an array.
    until shown=$(SLURM_TIME_FORMAT=standard scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null |
        grep "^JobId=$SLURM_JOB_ID "); do
        ((SECONDS < until)) || return 0
        sleep 10 || true
    done
    # The name is free text, which may look like fields.
    sed -E 's/ JobName=.* UserId=/ UserId=/' <<<"$shown"
}

# A field of what SHOWN says; "" where it has none.
field() {
    if [[ " $SHOWN " =~ " $1="([^ ]*) ]]; then
        case ${BASH_REMATCH[1]} in None | N/A | Unknown | "(null)") ;; *) echo "${BASH_REMATCH[1]}" ;; esac
    fi
}

know_job

# ---- the site -------------------------------------------------------------------------------

SITE=${SPT_SITE:-$SPT_ROOT/launch/slurm/site.sh}
[ -f "$SITE" ] || die "$SITE: no such file"
CONTAINER=()
# The file is the user's own, and modules break with these. In a function its `declare -x` would be lost.
set +eu
# shellcheck source=launch/slurm/site.sh
source "$SITE"
set -eu
# What comes before python.
IN_CONTAINER=(env)
[ ${#CONTAINER[@]} = 0 ] || IN_CONTAINER=("${CONTAINER[@]}")

# ---- what to run ----------------------------------------------------------------------------

# Run a script of launch/ on all ranks, to its end or to the job's return into the queue; the script then ends.
#     run_job train|sensitivity|evaluate CONFIG [options of the script]
run_job() {
    local kind=$1 name
    shift
    prepare "$kind" "$@"
    local config=$1
    shift
    local command=(python "$SPT_ROOT/launch/$kind.py" "$config")
    # Other scripts save no checkpoints, though there may be a run's where they write.
    if [ "$kind" = train ]; then
        command+=(--resume --work-dir "$SPT_FOLDER")
        RUNS=("$SPT_FOLDER")
        [ -z "${SPT_MEMBERS:-}" ] || while read -r name; do RUNS+=("$SPT_FOLDER/$name"); done <<<"$SPT_MEMBERS"
    fi
    run_ranks "${command[@]}" "$@"
}

# Train the suite's member that this task of an array stands for; nothing is written for the suite itself.
#     run_member SUITE [options of launch/train.py]
run_member() {
    [ -n "$ARRAY_TASK" ] || die "submit with --array=0-LAST, or with launch/submit.py SUITE --job array"
    prepare array "$@"
    local suite=$1 name
    shift
    name=$(sed -n "$((ARRAY_TASK + 1))p" <<<"${SPT_MEMBERS:-}")
    [ -n "$name" ] || die "task $ARRAY_TASK of the array: $suite has no such member"
    RUNS=("$SPT_FOLDER/$name")
    run_ranks python "$SPT_ROOT/launch/train.py" "$suite" --member "$name" --resume --work-dir "$SPT_FOLDER" "$@"
}

# Print the table of a suite whose members were trained by an array.
#     print_table SUITE_WORK_DIR
print_table() { "${IN_CONTAINER[@]}" python "$SPT_ROOT/launch/report.py" "$1" --out "$1"; }

# ---- before ---------------------------------------------------------------------------------

# Set LOGS, this job's folder, and RUNS, the work dirs whose checkpoints say how far it has come.
prepare() {
    local kind=$1
    shift
    [[ $# -gt 0 && $1 != -* ]] || die "which config? sbatch launch/slurm/$kind.sbatch CONFIG [options of the script]"
    [[ $LAUNCHER == srun || $LAUNCHER == torchrun ]] || die "SPT_LAUNCHER=$LAUNCHER has to be srun or torchrun"
    [ -n "${SPT_FOLDER:-}" ] || ask_submit "$kind" "$@"
    RUNS=()
    LOGS=${SPT_LOGS:-$SPT_FOLDER/slurm}/$JOB
    mkdir -p "$LOGS"
    cp "$0" "$LOGS/script.sbatch"
    say "start $RESTARTS on ${SLURM_JOB_NODELIST:-?}; each rank's output is in $LOGS/rank-N.log"
    local gpus=${SLURM_GPUS_ON_NODE:-$TASKS}
    [ "$gpus" = "$TASKS" ] ||
        say "warning: GPUs of this node: $gpus; ranks: $TASKS. As many ranks: --ntasks-per-node=$gpus"
}

# Set SPT_FOLDER and SPT_MEMBERS, which only the configs tell.
#     ask_submit train|array|sensitivity|evaluate CONFIG [options of the script]
ask_submit() {
    local kind=$1 config=$2 said
    shift 2
    said=$("${IN_CONTAINER[@]}" python "$SPT_ROOT/launch/submit.py" "$config" --job "$kind" --show -- "$@")
    # A container may have said something before.
    SPT_FOLDER=$(sed -n 's/^SPT_FOLDER=//p' <<<"$said")
    SPT_MEMBERS=$(sed -n 's/^SPT_MEMBER=//p' <<<"$said")
    [ -n "$SPT_FOLDER" ] || die "launch/submit.py did not say where $config writes, but: $said"
}

# Which checkpoints there are to go on from.
checkpoints() {
    local run
    [ ${#RUNS[@]} != 0 ] || return 0
    for run in "${RUNS[@]}"; do
        echo "$run: $(cat "$run/checkpoints/latest" 2>/dev/null)"
    done
}

# ---- the ranks ------------------------------------------------------------------------------

# Run a command on all ranks, tell how it went, and end this script.
run_ranks() {
    CHECKPOINTS=$(checkpoints)
    start_ranks "$@" &
    local ranks=$! status=0 next=0
    while kill -0 "$ranks" 2>/dev/null; do
        # Said again and again: ranks that are just being started don't hear it.
        if [ -n "$NOTICE" ] && ((SECONDS >= next)); then
            [ "$next" != 0 ] || say "asked to stop; telling the ranks"
            next=$((SECONDS + SECONDS_BETWEEN_NOTICES))
            # srun hands it on to every process of the step.
            kill -USR1 "$ranks" 2>/dev/null || true
        fi
        sleep 1 || true
    done
    wait "$ranks" || status=$?
    tell_end "$status"
    finish "$status"
}

# One task for each rank, or one for each node's torchrun.
start_ranks() {
    local nodes=$SLURM_JOB_NUM_NODES options ranks
    ranks=(bash "$SPT_ROOT/launch/slurm/rank.sh" "$LOGS")
    # Ranks don't end in the same moment. One that stopped behind its checkpoint, or says what went wrong, must not
    # have the others killed at once; and one that is left behind must not keep the job for long.
    options=(--nodes="$nodes" --export=ALL --kill-on-bad-exit=0 --wait=60)
    if [ "$LAUNCHER" = srun ]; then
        # srun does not take --cpus-per-task over from the job.
        [ "$CPUS" = 1 ] || options+=(--cpus-per-task="$CPUS")
        exec srun "${options[@]}" --ntasks="$((nodes * TASKS))" --ntasks-per-node="$TASKS" \
            "${ranks[@]}" "${IN_CONTAINER[@]}" "$@"
    fi
    local first port=$((12000 + SLURM_JOB_ID % 20000))
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # torchrun dies of USR1, which is meant for its ranks.
    exec srun "${options[@]}" --ntasks="$nodes" --ntasks-per-node=1 \
        --cpus-per-task="$((TASKS * CPUS))" bash -c "trap '' USR1; exec \"\$@\"" agent \
        "${IN_CONTAINER[@]}" torchrun --nnodes="$nodes" --nproc-per-node="$TASKS" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$JOB-$RESTARTS" --no-python "${ranks[@]}" "$@"
}

# ---- afterwards -----------------------------------------------------------------------------

# Show what the ranks said last, from this start on.
tell_end() {
    local log
    say "the ranks ended with status $1"
    for log in "$LOGS"/rank-*.log; do
        [ -f "$log" ] || continue
        of_this_start "$log" | grep -a '^error:' | sed "s|^|$(basename "$log" .log): |" || true
    done
    if [ -f "$LOGS/rank-0.log" ]; then
        echo "---- the last lines of $LOGS/rank-0.log"
        of_this_start "$LOGS/rank-0.log" | tail -n "$LAST_LINES"
        echo "----"
    fi
}

# What a log has behind the header of this start.
of_this_start() { awk -v header="== start $RESTARTS of job " 'index($0, header) == 1 { on = 1 } on' "$1"; }

# Put the job back into the queue, or end it with the status of its ranks.
finish() {
    local status=$1 why
    SHOWN=$(show_job)
    if ! why=$(reason_to_requeue "$status"); then
        say "$why"
        exit "$status"
    fi
    say "$why: back into the queue"
    scontrol requeue "$JOB" || { say "scontrol requeue failed; to go on, submit the same job again"; exit "$status"; }
    # SLURM ends this script.
    sleep 60 || true
    exit "$status"
}

# Whether the job goes back into the queue (0) or ends (1), and why, in words.
reason_to_requeue() {
    local status=$1 state preempted reason has_progress=
    state=$(field JobState) preempted=$(field PreemptTime) reason=$(field Reason)
    [ "$(checkpoints)" = "$CHECKPOINTS" ] || has_progress=1
    # SLURM says COMPLETING of all that it ends itself, and would requeue a job that was cancelled too.
    if [ -z "$SHOWN" ]; then
        echo "SLURM's controller does not answer; to go on, submit the same job again"
        return 1
    elif [ "$(field Restarts)" != "$RESTARTS" ]; then
        echo "SLURM has put it back into the queue"
        return 1
    elif [ "$state" = COMPLETING ] && [ "$reason" != TimeLimit ] && [ "$preempted" != "$(field EndTime)" ]; then
        echo "cancelled"
        return 1
    elif [ "$status" = 0 ]; then
        echo "done"
        return 1
    elif [ "$status" = "$USER_ERROR" ]; then
        echo "not tried again: the error above has to be mended first"
        return 1
    elif ((RESTARTS >= MOST_RESTARTS)); then
        echo "not tried again: it has been back in the queue $RESTARTS times (SPT_RESTARTS)"
        return 1
    elif [ "$(field Requeue)" = 0 ]; then
        echo "not tried again: submitted with --no-requeue"
        return 1
    elif [ -n "$preempted" ]; then
        echo "preempted"
    elif [ -n "$has_progress" ]; then
        echo "a checkpoint was saved since this start, to go on from"
    elif [ "$reason" = TimeLimit ] || near_limit; then
        echo "not tried again: the time limit came before a checkpoint; give it more time (--time)"
        return 1
    elif [ -n "$NOTICE" ] || [ "$status" = "$STOPPED" ]; then
        echo "asked to stop"
    else
        echo "not tried again: status $status, and no checkpoint since this start"
        return 1
    fi
}

# Whether the time limit is so near that a notice is that of the limit.
near_limit() {
    local end
    end=$(field EndTime)
    [ -n "$end" ] && end=$(date -d "$end" +%s) && ((end - $(date +%s) <= NOTICE_SECONDS + NOTICE_SLACK))
}
