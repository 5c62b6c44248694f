"""The hosts and the SLURM of these tests, made once and taken down at the end."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import CantRun, Cluster, Slurm
from tests.cluster.starting import Alone
from tests.launch.processes import run_script
from tests.launch.runs import write_backbone, write_config


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts with sshd; skips where they can't be made."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster") / "run")
    try:
        _bring_up(cluster, "no hosts")
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def slurm(hosts: Cluster) -> Slurm:
    """SLURM on those hosts; skips where it can't be had."""
    cluster = Slurm(hosts)
    _bring_up(cluster, "no SLURM")
    return cluster


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The small run on a single process, of 56 steps. Ask for the hosts before: where they are not, this isn't made."""
    folder = tmp_path_factory.mktemp("alone")
    config = write_config(folder / "tiny.py", checkpoint=write_backbone(folder / "backbone.safetensors", 0))
    run_script(["train.py", config, "--work-dir", folder / "run"]).check()
    return Alone(config, folder / "run")


@pytest.fixture
def local_disk(slurm: Slurm, tmp_path: Path) -> Iterator[Path]:
    """A path that is another file system on each node."""
    path = tmp_path / "local"
    path.mkdir()
    mounted = []
    try:
        for host in ("n1", "n2"):
            slurm.run(host, ["mount", "-t", "tmpfs", "tmpfs", path]).check()
            mounted.append(host)
        yield path
    finally:
        slurm.clear()
        for host in mounted:
            # Lazily: a process that was killed may have its files open for a moment longer.
            slurm.run(host, ["umount", "-l", path]).check()


def _bring_up(cluster: Cluster, without: str) -> None:
    """Skip where this machine can't, unless SPT_CLUSTER=1 says that it should; a script that fails fails the test."""
    try:
        cluster.up()
    except CantRun as reason:
        if os.environ.get("SPT_CLUSTER") == "1":
            pytest.fail(f"SPT_CLUSTER=1, but {without}: {reason}")
        pytest.skip(f"{without}: {reason}")
