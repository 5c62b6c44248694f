"""What the scripts in this folder share: common options, logging, and how they end."""

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist
from mmengine.config import DictAction
from rich.logging import RichHandler

from spt_dist import UserError
from spt_dist.config import load_config
from spt_dist.exits import FAULT, STOPPED, USER_ERROR, RunEnded
from spt_dist.parallel.environment import read_environment
from spt_dist.parallel.faults import is_mistake, is_out_of_memory
from spt_dist.parallel.signals import Stopped
from spt_dist.sections import RunConfig
from spt_dist.training.pipeline import with_overrides

SECONDS_FOR_RANK_ZERO = 20
TIME = "[%H:%M:%S]"


class ConfigOptions(DictAction):
    """``KEY=VALUE`` pairs; mmengine's own action fails with a traceback where the ``=`` is missing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for item in values:
            if "=" not in item:
                raise UserError(f"{option_string} {item}: has to be KEY=VALUE")
            if item.partition("=")[2].strip().startswith("pipe:") and " " in item.strip():
                raise UserError(f"{option_string} {item}: blanks would be lost; write the command into a config file")
        super().__call__(parser, namespace, values, option_string)


def make_parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose ``--help`` ends with an example."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config_options(parser: argparse.ArgumentParser, positional: bool = True) -> None:
    """The config and the options that change it; the launchers' own too."""
    if positional:
        parser.add_argument("config", metavar="CONFIG", help="config file, see configs/")
    else:
        parser.add_argument("--config", required=True, metavar="CONFIG", help="the config the task was trained with")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=ConfigOptions,
        default={},
        metavar="KEY=VALUE",
        help="change values of the config",
    )
    # The deepspeed launcher puts --local_rank=N in front; rank and size come from the environment.
    parser.add_argument("--local_rank", "--local-rank", dest="local_rank", type=int, help=argparse.SUPPRESS)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What a script that reads samples may be told about them."""
    parser.add_argument(
        "--skip-bad-samples",
        action="store_true",
        help="leave out samples that can't be read (data.skip_bad_samples), with a count, instead of ending there",
    )


def read_config(arguments: argparse.Namespace) -> RunConfig:
    """The config with everything that the command line changes."""
    config = load_config(arguments.config, arguments.cfg_options)
    return overridden(config, arguments, getattr(arguments, "work_dir", None))


def overridden(config: RunConfig, arguments: argparse.Namespace, work_dir: str | None = None) -> RunConfig:
    """A config with what the options, but ``--cfg-options``, change."""
    return with_overrides(
        config,
        work_dir,
        getattr(arguments, "engine", None),
        getattr(arguments, "amp", False),
        getattr(arguments, "skip_bad_samples", False),
    )


def run(main: Callable[[], None]) -> None:
    """Call ``main`` and end with one of the statuses of ``spt_dist.exits``.

    A user's mistake becomes one line on rank 0. Whatever else ends a run is told in one line too, by one rank, after
    a traceback where it is a fault.
    """
    rank = 0
    try:
        rank = read_environment().rank
        start_logging(rank)
        main()
    except Stopped as stopped:
        if rank == 0:
            _say(str(stopped))
        _end(STOPPED)
    except RunEnded as end:
        if end.tell:
            cause = traceback.format_exception(end.__cause__) if end.traceback else []
            _say("".join([*cause, f"error: {end}"]))
        _end(end.status)
    except Exception as error:
        if is_out_of_memory(error):
            _say(f"error: out of memory: {error}")
            _end(FAULT)
        if not is_mistake(error):
            raise
        # Every rank finds most mistakes, and rank 0's line is enough. Launchers end all ranks once one has ended, so
        # the others give rank 0 time to say it; if they are still here after that, the mistake is theirs alone.
        if rank:
            time.sleep(SECONDS_FOR_RANK_ZERO)
        _say(f"error: rank {rank}: {error}" if rank else f"error: {error}")
        _end(USER_ERROR)


def _say(line: str) -> None:
    # In one piece: other ranks write there too, and under deepspeed each piece is written at once.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _end(status: int) -> NoReturn:
    """End this process, whatever the process group still waits for."""
    if not dist.is_initialized():
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_logging(rank: int) -> None:
    """Log to the terminal on rank 0; the other ranks log warnings only."""
    if sys.stdout.isatty():
        handler: logging.Handler = RichHandler(show_path=False, omit_repeated_times=False, log_time_format=TIME)
    else:
        # A file that is searched later: each message in one line.
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-8s %(message)s", TIME))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("spt_dist").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)


def describe(values: dict[str, Any]) -> None:
    """Print names and values, one a line, aligned."""
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value}")
