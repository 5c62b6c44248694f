"""Saving and loading scores."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spt_dist import Scores, UserError
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard, shard_bounds
from tests.ranks import run_ranks
from tests.scores_for_tests import make_info

INDEX = FlatIndex(("a.weight", "a.bias", "b.weight"), ((3, 4), (3,), (2, 2)))
VALUES = torch.arange(INDEX.total, dtype=torch.float32)
INFO = make_info(
    num_samples=5,
    always_tuned={"cls_token": [1, 1, 4]},
    skipped={"pos_embed": "why"},
    matrices=["a.weight", "b.weight"],
    backbone_size=100,
    sample_ids=[1, 2],
)


def make_scores(values: Tensor = VALUES) -> Scores:
    """Scores whose parts are spread over the ranks there are."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    start, stop = shard_bounds(INDEX.total, size, rank)
    return Scores(ScoreShard(INDEX, start, values[start:stop].clone()), INFO)


def save_on_ranks(folder: str) -> None:
    """Save from several ranks."""
    make_scores().save(folder)


def load_on_ranks(folder: str) -> list[Tensor]:
    """Load on several ranks and gather everything."""
    scores = Scores.load(folder)
    assert scores.info == INFO
    assert len(scores.shard.values) <= -(-INDEX.total // dist.get_world_size())
    return [scores[name] for name in scores.names]


@pytest.mark.distributed
@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    run_ranks(save_on_ranks, writers, str(tmp_path))
    wanted = [VALUES[:12].view(3, 4), VALUES[12:15], VALUES[15:].view(2, 2)]
    for tensors in run_ranks(load_on_ranks, readers, str(tmp_path)):
        assert all(torch.equal(found, value) for found, value in zip(tensors, wanted, strict=True))


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    make_scores().save(tmp_path)
    make_scores(VALUES + 1).save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert torch.equal(Scores.load(tmp_path)["a.bias"], VALUES[12:15] + 1)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scores\.json: no such file"):
        Scores.load(tmp_path)
    make_scores().save(tmp_path)
    shard = next(tmp_path.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(UserError, match=f"{shard.name}.*truncated"):
        Scores.load(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}.*missing"):
        Scores.load(tmp_path)
    (tmp_path / "scores.json").write_text(json.dumps({"kind": "plan"}))
    with pytest.raises(UserError, match="not a score index"):
        Scores.load(tmp_path)


def test_unknown_names_are_key_errors() -> None:
    with pytest.raises(KeyError, match=r"c\.weight: not scored"):
        make_scores()["c.weight"]
