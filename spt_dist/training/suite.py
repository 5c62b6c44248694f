"""Running the tasks of a suite one after another."""

import gc
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from spt_dist.data.tasks import build_task
from spt_dist.errors import UserError
from spt_dist.files import write_text
from spt_dist.parallel.signals import StopSignals
from spt_dist.suites import Member, Suite
from spt_dist.training.pipeline import check_config, run_training
from spt_dist.training.record import is_finished
from spt_dist.training.reports import Report, ignore

SUITE_FILE = "suite.json"

logger = logging.getLogger(__name__)


@contextmanager
def naming(member: Member) -> Iterator[None]:
    """Say which member a mistake was found in.

    Raises:
        UserError: in the place of the one within.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{member.path}: {error}") from error


def write_suite(suite: Suite) -> None:
    """Write what the table of a suite is made from beside its members' summaries."""
    described = {"path": str(suite.path), "groups": suite.groups, "published": suite.published}
    write_text(suite.work_dir / SUITE_FILE, json.dumps(described, indent=1))


def run_suite(suite: Suite, resume: bool, report: Report = ignore, stop: StopSignals | None = None) -> None:
    """Run a suite's members. Collective; rank 0 writes.

    Args:
        suite: what to run.
        resume: leave out members that are finished, and go on with the one that is not from its latest checkpoint.
        report, stop: as ``run_training``.

    Raises:
        UserError: as ``run_training``, with the member's name.
        Stopped: the run was asked to stop.
    """
    for member in suite.members:
        with naming(member):
            check_config(member.config)
            report(0, f"looking at the data of {member.name}", limited=False)
            # A list or a shard that is missing is told now, not hours later.
            build_task(member.config.data, member.config.model.num_classes, member.config.model.normalize)
    if dist.get_rank() == 0:
        write_suite(suite)
    for number, member in enumerate(suite.members, start=1):
        where = f"task {number} of {len(suite.members)}: {member.name}"
        if resume and is_finished(member.config):
            logger.info("%s is finished, in %s", where, member.config.work_dir)
            continue
        logger.info("%s", where)
        with naming(member):
            run_training(member.config, str(member.path), "auto" if resume else None, report, stop)
        # What the last one leaves is held by cycles, and the next one needs the room.
        gc.collect()
        torch.cuda.empty_cache()
