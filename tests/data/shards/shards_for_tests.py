"""Shards and their indexes, made by tarfile and json alone, and a set's preparation that decodes nothing."""

import base64
import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spt_dist.data.samples import BadSampleError, Item, RawSample
from spt_dist.data.shards.index import ShardIndex
from spt_dist.data.shards.shard_set import ShardSet

Files = list[tuple[str, bytes]]
NUM_CLASSES = 7


def sample_files(index: int) -> Files:
    """A sample whose content says which it is. Sizes differ, and some are whole blocks."""
    image = (b"%d " % index).ljust([20, 512, 700, 1024][index % 4], b".")
    return [(f"{index:06d}.jpg", image), (f"{index:06d}.cls", b"%d" % (index % NUM_CLASSES))]


def tar_of(members: Iterable[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar file with these members; those given by name are regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if isinstance(name, str):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def crc(files: Files) -> int:
    """What the index keeps of a sample."""
    return zlib.crc32(b"".join(name.encode() + b"\0" + content for name, content in files))


def shard_fields(name: str, content: bytes, checksums: Sequence[int]) -> dict[str, Any]:
    """A shard as an index has it."""
    return {
        "name": name,
        "num_bytes": len(content),
        "num_samples": len(checksums),
        "sha256": hashlib.sha256(content).hexdigest(),
        "checksums": base64.b64encode(struct.pack(f"<{len(checksums)}I", *checksums)).decode(),
    }


def index_fields(splits: dict[str, list[dict[str, Any]]], kind: str = "classification") -> dict[str, Any]:
    """The content of an index."""
    return {
        "format": "spt_dist.shards",
        "version": 1,
        "kind": kind,
        "classes": [f"class {label}" for label in range(NUM_CLASSES)],
        "splits": {
            name: {"num_samples": sum(shard["num_samples"] for shard in shards), "shards": shards}
            for name, shards in splits.items()
        },
    }


def write_shards(folder: Path, sizes: Sequence[int], split: str = "train") -> Path:
    """Shards of these sizes, with samples numbered through, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, first = [], 0
    for number, size in enumerate(sizes):
        samples = [sample_files(index) for index in range(first, first + size)]
        content = tar_of(file for files in samples for file in files)
        name = f"{split}-{number:06d}.tar"
        (folder / name).write_bytes(content)
        shards.append(shard_fields(name, content, [crc(files) for files in samples]))
        first += size
    (folder / "index.json").write_text(json.dumps(index_fields({split: shards})))
    return folder


def write_shard(folder: Path, samples: Sequence[Files], content: bytes | None = None) -> Path:
    """One shard with an index of ``samples``; ``content`` instead of what they make."""
    folder.mkdir(parents=True, exist_ok=True)
    good = tar_of(file for files in samples for file in files)
    written = good if content is None else content
    (folder / "train-000000.tar").write_bytes(written)
    fields = shard_fields("train-000000.tar", written, [crc(files) for files in samples])
    (folder / "index.json").write_text(json.dumps(index_fields({"train": [fields]})))
    return folder


class Numbers:
    """A preparation: the input is the number that the image's content begins with."""

    def prepare(self, sample: RawSample, epoch: int | None, index: int) -> Item:
        number = sample.image.split(b" ")[0]
        if not number.isdigit():
            raise BadSampleError(f"{sample.name}: no number")
        return torch.tensor([int(number), index, -1 if epoch is None else epoch]), sample.target

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        return torch.stack(list(inputs)).float()

    def blank(self) -> Item:
        return torch.tensor([-1, -1, -1]), 0


def open_set(location: str | Path, split: str = "train", **options: Any) -> ShardSet:
    """The set of a split, that hands out numbers."""
    return ShardSet(str(location), ShardIndex.load(str(location)), split, Numbers(), **options)


def read(samples: ShardSet, epoch: int | None, indices: Sequence[int]) -> list[int | str]:
    """The numbers that arrive; for a bad sample its error."""
    return [
        str(item) if isinstance(item, BadSampleError) else int(item[0][0]) for item in samples.stream(epoch, indices)
    ]
