import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import TaskID

from spt_dist import UserError
from spt_dist.data import image_set
from spt_dist.data.batches import Dealt
from spt_dist.data.image_set import ImageList, ImageSet
from spt_dist.data.loader import Skipped, load_batches
from spt_dist.data.pictures import PicturePreparation
from spt_dist.data.samples import BadSampleError
from spt_dist.progress import Bar
from tests.data.pictures_for_tests import write_image

Preparation = PicturePreparation


@pytest.fixture
def images(tmp_path: Path) -> ImageList:
    """Five images of five sizes; of the label of the fourth there are two."""
    files = [f"images/{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        write_image(tmp_path / file, seed=number, size=(20 + 3 * number, 16 + number))
    return ImageList(tmp_path, files, [3, 1, 2, 0, 0], ("a", "b", "c", "d"), "a list")


def items(dataset: ImageSet, epoch: int | None = None) -> list[tuple[torch.Tensor, int]]:
    return [dataset.item(epoch, index) for index in range(len(dataset))]


def assert_equal(one: list[tuple[torch.Tensor, int]], other: list[tuple[torch.Tensor, int]]) -> None:
    assert [label for _, label in one] == [label for _, label in other]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


@pytest.mark.parametrize("on_device", [False, True])
def test_in_memory_or_not_the_samples_are_the_same(images: ImageList, on_device: bool) -> None:
    preparation = Preparation("vtab", 32, on_device)
    read = ImageSet(images, preparation, in_memory=False, num_workers=3)
    kept = ImageSet(images, preparation, in_memory=True, num_workers=3)
    assert (read.num_workers, kept.num_workers) == (3, 0)
    assert_equal(items(read), items(kept))
    assert_equal(items(read, 4), items(kept, 4))
    assert [label for _, label in items(read)] == images.labels


def test_in_memory_files_are_read_once(images: ImageList) -> None:
    kept = ImageSet(images, Preparation("vtab", 32))
    first = items(kept)
    for file in images.files:
        (images.root / file).unlink()
    assert_equal(items(kept, 1), first)


def test_what_is_warm_is_not_read_with_the_first_sample(images: ImageList) -> None:
    kept, read = (ImageSet(images, Preparation("vtab", 32), in_memory=in_memory) for in_memory in (True, False))
    expected = items(read)
    for dataset in (kept, read):
        dataset.warm_up()
        dataset.warm_up()
    for file in images.files:
        (images.root / file).unlink()
    assert_equal(items(kept), expected)
    with pytest.raises(BadSampleError, match="can't be read"):
        read.item(None, 0)


def test_warming_up_leaves_bad_samples_to_who_asks_for_them(images: ImageList) -> None:
    (images.root / "images/1.png").unlink()
    kept = ImageSet(images, Preparation("vtab", 32), in_memory=True)
    kept.warm_up()
    kept.item(None, 0)
    with pytest.raises(BadSampleError, match=r"/images/1\.png: can't be read"):
        kept.item(None, 1)


def test_a_warm_up_that_was_interrupted_begins_anew(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ImageSet(images, Preparation("vtab", 32), in_memory=True)

    class Stopped(Bar):
        def advance(self, steps: int = 1, note: str = "") -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_set, "progress_bar", lambda *_: nullcontext(Stopped(None, TaskID(0))))
        with pytest.raises(KeyboardInterrupt):
            kept.warm_up()
    assert len(items(kept)) == 5


@pytest.mark.parametrize(
    ("num_images", "show", "shown"), [(1001, True, True), (1000, True, False), (1001, False, False)]
)
def test_many_images_are_read_behind_a_bar(
    images: ImageList, monkeypatch: pytest.MonkeyPatch, num_images: int, show: bool, shown: bool
) -> None:
    advanced, enabled, threads = 0, [], []

    class Counted(Bar):
        def advance(self, steps: int = 1, note: str = "") -> None:
            nonlocal advanced
            advanced += steps

    def bar(description: str, total: int, is_enabled: bool) -> Any:
        assert total == num_images
        enabled.append(is_enabled)
        return nullcontext(Counted(None, TaskID(0)))

    def pool(num_threads: int) -> ThreadPoolExecutor:
        threads.append(num_threads)
        return ThreadPoolExecutor(num_threads)

    many = replace(images, files=images.files[:1] * num_images, labels=[0] * num_images)
    monkeypatch.setattr(image_set, "progress_bar", bar)
    monkeypatch.setattr(image_set, "ThreadPoolExecutor", pool)
    # A rank may be given some of the cores only.
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5})
    ImageSet(many, Preparation("vtab", 8), in_memory=True).warm_up(show)
    assert enabled == [shown]
    assert advanced == num_images
    assert threads == [3]


def test_what_is_kept_by_default(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ImageSet(images, Preparation("vtab", 32)).num_workers == 0
    assert ImageSet(images, Preparation("fgvc", 32)).num_workers == 4
    assert ImageSet(images, Preparation("vtab", 32, on_device=True)).num_workers == 4
    # Five images of 3 x 32 x 32 bytes; in fp32 four times that.
    monkeypatch.setattr(image_set, "_MOST_KEPT", 5 * 3 * 32 * 32)
    assert ImageSet(images, Preparation("vtab", 32)).num_workers == 0
    assert ImageSet(images, Preparation("vtab_vpt", 32)).num_workers == 4
    monkeypatch.setattr(image_set, "_MOST_KEPT", 5 * 3 * 32 * 32 - 1)
    assert ImageSet(images, Preparation("vtab", 32)).num_workers == 4


def test_random_crops_can_be_kept_only_before_they_are_drawn(images: ImageList) -> None:
    with pytest.raises(UserError, match=r"data\.in_memory=True, but data\.transform draws .* data\.on_device=True"):
        ImageSet(images, Preparation("fgvc", 32), in_memory=True)
    preparation = Preparation("fgvc", 32, on_device=True)
    kept = ImageSet(images, preparation, in_memory=True)
    image, _ = kept.item(1, 2)
    one, other = (kept.finish([image], epoch, [2]) for epoch in (1, 2))
    assert not torch.equal(one, other)


def test_random_crops_follow_from_epoch_and_index(images: ImageList) -> None:
    dataset = ImageSet(images, Preparation("fgvc", 32))
    assert_equal(items(dataset, 1), items(dataset, 1))
    assert not torch.equal(dataset.item(1, 2)[0], dataset.item(2, 2)[0])
    assert not torch.equal(dataset.item(1, 2)[0], dataset.item(None, 2)[0])


@pytest.mark.parametrize("in_memory", [False, True])
def test_bad_samples_are_errors_of_their_own(images: ImageList, in_memory: bool) -> None:
    (images.root / "images/1.png").write_text("no image")
    (images.root / "images/3.png").unlink()
    dataset = ImageSet(images, Preparation("vtab", 32), in_memory=in_memory)
    for index in (0, 2, 4):
        dataset.item(None, index)
    for _ in range(2):
        with pytest.raises(BadSampleError, match=r"/images/1\.png: is no image"):
            dataset.item(None, 1)
        with pytest.raises(BadSampleError, match=r"/images/3\.png: can't be read \(No such file"):
            dataset.item(None, 3)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_through_the_loader(images: ImageList, num_workers: int, on_device: bool) -> None:
    (images.root / "images/1.png").write_text("no image")
    preparation = Preparation("fgvc", 32, on_device)
    dataset = ImageSet(images, preparation, skip_bad=True, num_workers=num_workers)
    skipped = Skipped()
    dealt = [Dealt(epoch=6, indices=[4, 1, 0], weights=[1.0, 1.0, 1.0], num_global=3)]
    (batch,) = load_batches(dataset, dealt, torch.device("cpu"), skipped)
    assert batch.weights.tolist() == [1.0, 0.0, 1.0]
    assert skipped.indices == {1}
    for place, index in ((0, 4), (2, 0)):
        image, label = dataset.item(6, index)
        assert torch.equal(batch.inputs[place], preparation.finish([image], 6, [index])[0])
        assert batch.targets[place] == label


def test_a_negative_number_of_workers_is_refused(images: ImageList) -> None:
    with pytest.raises(UserError, match=r"data\.num_workers=-1 has to be 0 or more"):
        ImageSet(images, Preparation("vtab", 32), num_workers=-1)
