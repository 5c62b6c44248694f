"""Write a SLURM job script for a config or a suite, and submit it. Everything after -- goes to the script that the job
runs: launch/train.py, sensitivity.py or evaluate.py."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _cli import add_config_options, add_data_options, describe, make_parser, overridden, run
from spt_dist import UserError
from spt_dist.config import load_config, lookup
from spt_dist.files import write_text
from spt_dist.jobs import array_indices, parse_directives, plain_path, render_script, time_limit
from spt_dist.suites import Suite, is_suite, load_suite
from spt_dist.training.pipeline import check_config
from spt_dist.training.suite import naming, write_suite

EXAMPLE = """python launch/submit.py configs/vtab/cifar.py --nodes 2 --gpus-per-node 8 --partition gpu -- --engine fsdp
  python launch/submit.py configs/vtab/all.py --job array --at-once 4 --time 8:00:00 --sbatch mail-type=END
  python launch/submit.py configs/vtab/cifar.py --job sensitivity --dry-run -- --out scores/cifar"""

ROOT = Path(__file__).resolve().parents[1]
JOBS = ("train", "sensitivity", "evaluate", "array")
# Options that are passed on as they are.
PASSED_ON = ("partition", "account", "qos", "time", "mem", "constraint")
SHORTEST_NOTICE = 10
# SLURM may send the notice so many seconds earlier.
NOTICE_SLACK = 60
# Of the array's options, those that the job of its table, a small one, takes over.
OF_THE_TABLE = (
    *("account", "clusters", "comment", "constraint", "exclude", "mail-type", "mail-user", "partition", "qos"),
    *("reservation", "time", "wckey"),
)
# Of SLURM's variables, what sbatch itself needs; the others may be those of a job around us.
KEPT = ("SLURM_CONF", "SLURM_JWT")
# What --sbatch can't say, and what does.
SAID_OTHERWISE = {"array": "--job array, --tasks and --at-once", "signal": "--notice"}


@dataclass(frozen=True)
class Target:
    """What a job runs.

    Attributes:
        folder: where it writes; the logs go below.
        suite: for a suite, with all members.
        only: names of the members to be run; all where it is empty.
    """

    folder: Path
    suite: Suite | None = None
    only: Sequence[str] = ()


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    add_options(parser)
    own, passed = split_arguments(sys.argv[1:])
    arguments = parser.parse_args(own)
    if arguments.tasks and arguments.job == "train":
        passed += ["--tasks", *arguments.tasks]
    target = find_target(arguments.config, arguments.job, passed, arguments.tasks)
    if arguments.show:
        show(target)
    else:
        check_options(arguments)
        submit(arguments, target, passed)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The job's options, those of ``sbatch`` first."""
    parser.add_argument("config", metavar="CONFIG", help="config file of a task or a suite, see configs/")
    parser.add_argument("--job", choices=JOBS, default="train", help="array: a suite's tasks side by side")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="of the job, or of each task of an array")
    parser.add_argument("--gpus-per-node", type=int, default=1, metavar="N", help="and as many ranks; 0: on the CPU")
    parser.add_argument("--tasks-per-node", type=int, metavar="N", help="with --gpus-per-node 0: ranks of a node")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="cores of a rank")
    for name in PASSED_ON:
        parser.add_argument(f"--{name}", metavar="VALUE", help="as sbatch takes it")
    parser.add_argument("--name", help="of the job (default: that of the config)")
    parser.add_argument("--sbatch", nargs="+", default=[], metavar="KEY=VALUE", help="further options of sbatch")
    parser.add_argument("--notice", type=int, default=120, metavar="SECONDS", help="for saving a checkpoint at the end")
    parser.add_argument("--launcher", choices=("srun", "torchrun"), default="srun", help="what starts the ranks")
    parser.add_argument("--site", type=Path, metavar="FILE", help="instead of launch/slurm/site.sh")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="that all nodes see (default: slurm/ in the work dir)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="of a suite, run these tasks only")
    parser.add_argument("--at-once", type=int, metavar="N", help="of an array: tasks that run at the same time")
    parser.add_argument("--dry-run", action="store_true", help="print script and command; write and submit nothing")
    # For the job scripts, which ask what only the configs tell.
    parser.add_argument("--show", action="store_true", help=argparse.SUPPRESS)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what goes to the script."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:place]), list(arguments[place + 1 :])


def find_target(config_path: str, job: str, passed: Sequence[str], only: Sequence[str] = ()) -> Target:
    """Load the config as the job will, so that a mistake in it is told before the job waits in the queue.

    Args:
        config_path: of a task or a suite.
        job: one of ``JOBS``.
        passed: options for the script.
        only: of a suite, the tasks to be run.

    Raises:
        UserError: as ``load_config`` and ``check_config``; the job is not for this kind of config, or an option that it
            needs is missing.
    """
    options = _read_passed(passed)
    if options.resume not in (None, "auto"):
        raise UserError(f"--resume {options.resume}: a job goes on from its own latest checkpoint, at each start")
    if not is_suite(config_path):
        if job == "array" or only:
            option = "--job array" if job == "array" else "--tasks"
            raise UserError(f"{option}: {config_path} is one task's config, not a suite")
        config = overridden(load_config(config_path, options.cfg_options), options, options.work_dir)
        check_config(config)
        return Target(_folder(job, options, Path(config.work_dir)))
    if job not in ("train", "array"):
        raise UserError(f"--job {job}: {config_path} is a suite; take one task's config")
    if job == "array" and options.tasks:
        raise UserError(f"--tasks {' '.join(options.tasks)}: of an array, give it before the --")
    suite = load_suite(config_path, options.cfg_options, options.work_dir)
    for name in only or options.tasks:
        lookup("--tasks", name, {member.name: member for member in suite.members})
    for member in suite.members:
        with naming(member):
            check_config(overridden(member.config, options))
    return Target(suite.work_dir, suite, only)


def show(target: Target) -> None:
    """Print what launch/slurm/job.sh asks, marked: a container may print something too."""
    print(f"SPT_FOLDER={target.folder}")
    for member in target.suite.members if target.suite is not None else ():
        print(f"SPT_MEMBER={member.name}")


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse what sbatch would take, or tell in other words."""
    at_least = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "at_once": 1}
    for name, least in {**at_least, "notice": SHORTEST_NOTICE}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: has to be at least {least}")
    if arguments.tasks_per_node is not None and arguments.gpus_per_node:
        raise UserError(f"--tasks-per-node {arguments.tasks_per_node}: is for --gpus-per-node 0; a GPU has one rank")
    if arguments.at_once is not None and arguments.job != "array":
        raise UserError(f"--at-once {arguments.at_once}: is for --job array")
    if arguments.site is not None and not arguments.site.is_file():
        raise UserError(f"--site {arguments.site}: no such file")
    asked = _asked(arguments)
    for name, others in SAID_OTHERWISE.items():
        if name in asked:
            raise UserError(f"--sbatch {name}: take {others}")
    seconds = time_limit(asked["time"] or "") if "time" in asked else None
    if seconds is not None and seconds <= arguments.notice + NOTICE_SLACK:
        raise UserError(
            f"--time {asked['time']}: has to be above the --notice of {arguments.notice} s and {NOTICE_SLACK} s more, "
            "by which SLURM may send it earlier; the job would be told to stop as it starts"
        )


def submit(arguments: argparse.Namespace, target: Target, passed: Sequence[str]) -> None:
    """Write the job's script, submit it, and say what can be done next; for an array the job of the table too."""
    folder = _logs(arguments, target)
    script = make_script(arguments, target, passed)
    path = folder / f"{arguments.job}.sbatch"
    table = make_table_script(arguments, target) if arguments.job == "array" else None
    if arguments.dry_run:
        print(script)
        print(f"# sbatch {shlex.quote(str(path))}")
        if table is not None:
            print(f"\n{table}\n# sbatch --dependency=afterany:JOBID {shlex.quote(str(folder / 'table.sbatch'))}")
        return
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; run this where SLURM's commands are, or take --dry-run")
    if target.suite is not None and table is not None:
        write_suite(target.suite)
    job_id = _sbatch(write_text(path, script))
    log = folder / (f"{job_id}_TASK.out" if arguments.job == "array" else f"{job_id}.out")
    describe({"job": job_id, "its log": log, "to look": f"squeue --job {job_id}", "to end it": f"scancel {job_id}"})
    if table is not None:
        try:
            table_id = _sbatch(write_text(folder / "table.sbatch", table), [f"--dependency=afterany:{job_id}"])
        except UserError as error:
            by_hand = shlex.join(["python", "launch/report.py", str(target.folder), "--out", str(target.folder)])
            raise UserError(
                f"the job of the table: {error}; the array, job {job_id}, goes on, and {by_hand} prints its table"
            ) from error
        describe({"job of the table": table_id})


def make_script(arguments: argparse.Namespace, target: Target, passed: Sequence[str]) -> str:
    """The job's script."""
    output = "%A_%a.out" if arguments.job == "array" else "%j.out"
    ranks = arguments.gpus_per_node or arguments.tasks_per_node or 1
    directives: dict[str, str | None] = {
        "job-name": arguments.name or Path(arguments.config).stem,
        "nodes": str(arguments.nodes),
        "ntasks-per-node": str(ranks),
        "signal": f"B:USR1@{arguments.notice}",
        "chdir": str(Path.cwd()),
        "output": f"{plain_path(str(_logs(arguments, target).absolute()))}/{output}",
    }
    if arguments.gpus_per_node:
        directives["gpus-per-node"] = str(arguments.gpus_per_node)
    if arguments.cpus_per_task is not None:
        directives["cpus-per-task"] = str(arguments.cpus_per_task)
    if arguments.job == "array":
        assert target.suite is not None
        names = [member.name for member in target.suite.members]
        directives["array"] = array_indices(names, target.only, arguments.at_once)
    directives |= _asked(arguments)
    return render_script(
        _template(arguments.job), directives, _variables(arguments, target), [arguments.config, *passed]
    )


def make_table_script(arguments: argparse.Namespace, target: Target) -> str:
    """The script of the job that prints a suite's table."""
    directives: dict[str, str | None] = {
        "job-name": f"{arguments.name or Path(arguments.config).stem}-table",
        "chdir": str(Path.cwd()),
        "output": f"{plain_path(str(_logs(arguments, target).absolute()))}/%j.out",
    }
    directives |= {name: value for name, value in _asked(arguments).items() if name in OF_THE_TABLE}
    return render_script(_template("table"), directives, _variables(arguments, target), [str(target.folder)])


def _read_passed(passed: Sequence[str]) -> argparse.Namespace:
    """What the script will make of those of its options that say what is run, and where."""
    parser = make_parser("the script's options, given after --", EXAMPLE)
    add_config_options(parser)
    add_data_options(parser)
    for name in ("--work-dir", "--out", "--task", "--merged", "--engine"):
        parser.add_argument(name)
    parser.add_argument("--resume", nargs="?", const="auto")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=[])
    return parser.parse_known_args(["CONFIG", *passed])[0]


def _folder(job: str, options: argparse.Namespace, work_dir: Path) -> Path:
    """Where the job writes."""
    if job == "sensitivity":
        if options.out is None:
            raise UserError("--job sensitivity: where to? add `-- --out DIR`")
        return Path(options.out)
    if job == "evaluate":
        if (options.task or options.merged) is None:
            raise UserError("--job evaluate: what? add `-- --task FILE` or `-- --merged FILE`")
        return Path(options.task or options.merged).parent
    return work_dir


def _asked(arguments: argparse.Namespace) -> dict[str, str | None]:
    """The options of sbatch that the user has given as such."""
    given = {name: getattr(arguments, name) for name in PASSED_ON if getattr(arguments, name) is not None}
    return given | parse_directives(arguments.sbatch)


def _logs(arguments: argparse.Namespace, target: Target) -> Path:
    """Folder of the job's script and logs, which the first node has to see before anything of the job runs."""
    return arguments.logs if arguments.logs is not None else target.folder / "slurm"


def _template(job: str) -> str:
    return (ROOT / "launch" / "slurm" / f"{job}.sbatch").read_text(encoding="utf-8")


def _variables(arguments: argparse.Namespace, target: Target) -> dict[str, str]:
    """What launch/slurm/job.sh would have to find out."""
    variables = {
        "SPT_ROOT": str(ROOT),
        "SPT_LAUNCHER": arguments.launcher,
        "SPT_NOTICE": str(arguments.notice),
        "SPT_LOGS": str(_logs(arguments, target)),
        "SPT_FOLDER": str(target.folder),
    }
    if arguments.site is not None:
        variables["SPT_SITE"] = str(arguments.site.absolute())
    if target.suite is not None:
        variables["SPT_MEMBERS"] = "\n".join(member.name for member in target.suite.members)
    return variables


def _sbatch(path: Path, options: Sequence[str] = ()) -> str:
    """Submit a script; returns the job's id."""
    command = ["sbatch", "--parsable", *options, str(path)]
    print(shlex.join(command))
    # sbatch hands its environment on to the job.
    environment = {name: value for name, value in os.environ.items() if name in KEPT or not name.startswith("SLURM_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise UserError(f"sbatch does not take {path}: {said}")
    return done.stdout.strip().split(";")[0]


if __name__ == "__main__":
    run(main)
