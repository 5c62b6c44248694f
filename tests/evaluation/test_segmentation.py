"""Segmentation and its mean IoU against mmseg's, and on ranks that have different numbers of windows.

Shape suffixes: K classes, H height, W width, C channels; h, w of a window.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from spt_dist.compat import start_deepspeed
from spt_dist.data.task import Task
from tests.evaluation.segmentation_for_tests import CLASSES, SIZES, SLIDE, FakeSet, TinyNet, make_setr
from tests.ranks import run_ranks

pytest.importorskip("mmseg")
from spt_dist.evaluation import segmentation
from spt_dist.evaluation.segmentation import evaluate_miou, in_step, predict, segment_images

pytestmark = [pytest.mark.segmentation, pytest.mark.filterwarnings("ignore::UserWarning:mm")]
CPU = torch.device("cpu")
WHOLE = {"mode": "whole"}
SCALES = (0.5, 1.0, 1.75)


def make_task(sizes: list[tuple[int, int]] = SIZES, num_workers: int = 0) -> Task:
    samples: Any = FakeSet(sizes)
    samples.num_workers = num_workers
    return Task(samples, samples, len(samples), len(samples), len(CLASSES), "segmentation")


def mmseg_samples(model: nn.Module, views: list[Tensor], size: tuple[int, int], flips: tuple[bool, ...]) -> list[Any]:
    """What mmseg's own ``predict`` makes of each view."""
    from mmseg.structures import SegDataSample

    samples = []
    for view_CHW in views:
        for is_flipped in flips:
            shape = tuple(view_CHW.shape[1:])
            metas = {"ori_shape": size, "img_shape": shape, "pad_shape": shape, "img_path": "a.jpg"}
            flipping = {"flip": is_flipped, "flip_direction": "horizontal" if is_flipped else None}
            sample = SegDataSample(metainfo=metas | flipping)
            image_CHW = view_CHW.flip(-1) if is_flipped else view_CHW
            with torch.no_grad():
                samples += model.predict(image_CHW[None], [sample])
    return samples


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("test_cfg", [SLIDE, WHOLE], ids=lambda test_cfg: test_cfg["mode"])
@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_one_view_is_decided_as_mmseg_does(test_cfg: dict[str, Any], align_corners: bool, scale: float) -> None:
    model, samples = make_setr(test_cfg, align_corners), FakeSet()
    for views, label_HW in samples.views([scale]):
        (wanted,) = mmseg_samples(model, views, tuple(label_HW.shape), flips=(False,))
        found_HW = predict(model, model, views, label_HW.shape, flip=False, windows_per_pass=1)
        assert torch.equal(found_HW, wanted.pred_sem_seg.data[0])
        assert found_HW.unique().numel() > 1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("test_cfg", [SLIDE, WHOLE], ids=lambda test_cfg: test_cfg["mode"])
def test_several_views_are_merged_as_mmseg_does(test_cfg: dict[str, Any], flip: bool) -> None:
    from mmseg.models import SegTTAModel

    model, samples = make_setr(test_cfg), FakeSet()
    num_by_logits = 0
    for views, label_HW in samples.views(SCALES):
        opinions = mmseg_samples(model, views, tuple(label_HW.shape), (False, True) if flip else (False,))
        by_logits_HW = sum(opinion.seg_logits.data for opinion in opinions).argmax(dim=0)
        (wanted,) = SegTTAModel(module=model).merge_preds([opinions])
        found_HW = predict(model, model, views, label_HW.shape, flip, windows_per_pass=1)
        assert torch.equal(found_HW, wanted.pred_sem_seg.data[0])
        num_by_logits += int((found_HW != by_logits_HW).sum())
    # Averaging logits is another rule, and these images tell.
    assert num_by_logits > 20


def test_a_mirrored_view_counts_as_one_of_two() -> None:
    model, samples = make_setr(WHOLE), FakeSet()
    ((view_CHW,), label_HW) = samples.views([1.0])[1]
    size = tuple(label_HW.shape)
    with torch.no_grad():
        upright, mirrored = (
            F.interpolate(model(image_CHW[None])[0], size, mode="bilinear")[0].softmax(dim=0)
            for image_CHW in (view_CHW, view_CHW.flip(-1))
        )
    found_HW = predict(model, model, [view_CHW], size, flip=True)
    assert torch.equal(found_HW, (upright + mirrored.flip(-1)).argmax(dim=0))
    assert not torch.equal(found_HW, upright.argmax(dim=0))
    assert not torch.equal(found_HW, (upright + mirrored).argmax(dim=0))


def count_areas(model: nn.Module, task: Task) -> list[Tensor]:
    """Per image, by a loop over the classes: pixels of intersection, union, prediction and truth: ``(4, K)``."""
    areas = []
    for (view_CHW,), label_HW in task.val.views([1.0]):  # type: ignore[attr-defined]
        prediction_HW = predict(model, model, [view_CHW], label_HW.shape, flip=False)
        kept = label_HW != 255
        rows = []
        for k in range(len(CLASSES)):
            is_k, is_said = (label_HW == k) & kept, (prediction_HW == k) & kept
            rows.append([int(mask.sum()) for mask in (is_k & is_said, is_k | is_said, is_said, is_k)])
        areas.append(torch.tensor(rows, dtype=torch.float64).T)
    return areas


def trained(model: nn.Module) -> nn.Module:
    """The model with its output for the last class shut off, so that this class occurs nowhere."""
    with torch.no_grad():
        model.get_submodule("head.1").bias[-1] = -100.0  # type: ignore[index,operator]
    return model


def test_shares_are_those_of_mmseg() -> None:
    from mmseg.evaluation import IoUMetric

    model, task = trained(TinyNet(SLIDE)).eval(), make_task()
    found = evaluate_miou(model, model, task, CPU)
    metric = IoUMetric()
    metric.dataset_meta = {"classes": CLASSES}
    for (view_CHW,), label_HW in task.val.views([1.0]):  # type: ignore[attr-defined]
        prediction_HW = predict(model, model, [view_CHW], label_HW.shape, flip=False)
        metric.process({}, [{"pred_sem_seg": {"data": prediction_HW}, "gt_sem_seg": {"data": label_HW}}])
    wanted = metric.compute_metrics(metric.results)
    # mmseg rounds to hundredths of a per cent.
    assert found == {key: pytest.approx(wanted[key] / 100, abs=5.1e-5) for key in ("mIoU", "mAcc", "aAcc")}

    areas = count_areas(model, task)
    intersection, union, _, truth = torch.stack(areas).sum(dim=0)
    assert union[-1] == 0
    assert found["mIoU"] == pytest.approx(float((intersection / union)[:-1].mean()), rel=1e-12)
    assert found["mAcc"] == pytest.approx(float((intersection / truth)[:-1].mean()), rel=1e-12)
    assert found["aAcc"] == pytest.approx(float(intersection.sum() / truth.sum()), rel=1e-12)
    # The mean over images, and a class that occurs nowhere taken for a failure, would be something else.
    per_image = torch.stack([(image[0] / image[1]).nanmean() for image in areas]).mean()
    assert abs(found["mIoU"] - float(per_image)) > 0.005
    assert abs(found["mIoU"] - float((intersection / union).nan_to_num().mean())) > 0.01


def test_a_class_that_is_only_predicted_lowers_the_iou_but_not_the_accuracy() -> None:
    model, task = TinyNet(WHOLE).eval(), make_task()
    with torch.no_grad():
        model.get_submodule("head.1").bias[-1] = 100.0  # type: ignore[index,operator]
    assert evaluate_miou(model, model, task, CPU) == {"mIoU": 0.0, "mAcc": 0.0, "aAcc": 0.0}
    with torch.no_grad():
        model.get_submodule("head.1").bias[-1] = 0.0  # type: ignore[index,operator]
    intersection, union, said, truth = torch.stack(count_areas(model, task)).sum(dim=0)
    assert truth[-1] == 0 < said[-1]
    found = evaluate_miou(model, model, task, CPU)
    assert found["mIoU"] == pytest.approx(float((intersection / union).sum() / 6), rel=1e-12)
    assert found["mAcc"] == pytest.approx(float((intersection / truth)[:-1].sum() / 5), rel=1e-12)


def test_areas_of_more_pixels_than_fp32_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 images of ADE20K have half a billion pixels."""
    label_HW, prediction_HW = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1]])

    def areas(*_: Any) -> tuple[Tensor, ...]:
        # As mmseg gives them for an image of 50 million pixels and for one of 3.
        rows = [[25.0e6, 25.0e6], [25.0e6, 25.0e6], [25.0e6, 25.0e6], [25.0e6, 25.0e6]]
        rows = rows if next(turns) == 0 else [[1.0, 1.0], [2.0, 2.0], [1.0, 2.0], [2.0, 1.0]]
        return tuple(torch.tensor(rows))

    turns = iter(range(5))
    monkeypatch.setattr(segmentation, "segment_images", lambda *_: [(0, prediction_HW, label_HW)] * 5)
    monkeypatch.setattr(segmentation.IoUMetric, "intersect_and_union", staticmethod(areas))
    net = TinyNet(WHOLE)
    task: Any = Task(None, None, 5, 5, 2, "segmentation")  # type: ignore[arg-type]
    assert evaluate_miou(net, net, task, CPU)["mIoU"] == pytest.approx((25e6 + 4) / (25e6 + 8), rel=1e-12)


def test_modes_and_random_numbers_stay_as_they_were() -> None:
    model, task = TinyNet(SLIDE).train(), make_task()
    means, state = model.get_submodule("stem.1").running_mean.clone(), torch.get_rng_state()  # type: ignore[operator]
    first = evaluate_miou(model, model, task, CPU, scales=(1.0, 0.5), flip=True)
    assert model.training
    assert torch.equal(model.get_submodule("stem.1").running_mean, means)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert evaluate_miou(model, model, task, CPU, scales=(1.0, 0.5), flip=True) == first
    assert not model.training


def test_mode_is_restored_after_an_error() -> None:
    model, task = TinyNet(SLIDE).train(), make_task()

    def forward(_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_miou(forward, model, task, CPU)
    assert model.training


def test_loading_in_workers_changes_nothing() -> None:
    model = TinyNet(SLIDE)
    wanted = evaluate_miou(model, model, make_task(), CPU, scales=(1.0, 0.5))
    assert evaluate_miou(model, model, make_task(num_workers=2), CPU, scales=(1.0, 0.5)) == wanted


def test_progress_is_shown_where_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    model = TinyNet(WHOLE)
    evaluate_miou(model, model, make_task([(16, 16)] * segmentation.MANY_IMAGES), CPU)
    shown = capsys.readouterr().out
    assert "evaluation" in shown
    assert f"{segmentation.MANY_IMAGES}/{segmentation.MANY_IMAGES}" in shown
    evaluate_miou(model, model, make_task(), CPU)
    assert capsys.readouterr().out == ""


def wrap(model: nn.Module, how: str) -> nn.Module:
    """The model as an engine would have it."""
    if how == "fsdp":
        fully_shard(model.get_submodule("stem"))
        return fully_shard(model)
    if how == "zero":
        import deepspeed

        start_deepspeed()
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        optimizer = torch.optim.AdamW(model.parameters())
        engine: nn.Module = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        return engine
    return model


def evaluate_sharded(how: str) -> list[tuple[dict[str, float], list[int], list[int]]]:
    """Shares, the windows of each forward pass, and the images of this rank; for five images, and for a single one."""
    net = TinyNet(SLIDE)
    engine = wrap(net, how)
    results = []
    for sizes, options in ((SIZES, {}), (SIZES, {"scales": (1.0, 1.5), "flip": True}), (SIZES[3:4], {})):
        net.passes.clear()
        task = make_task(sizes)
        shares = evaluate_miou(engine, net, task, CPU, windows_per_pass=2, **options)
        passes = list(net.passes)
        mine = [index for index, _, _ in segment_images(engine, net, task, CPU, range(len(sizes)), (1.0,), False)]
        results.append((shares, passes, mine))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["plain", "fsdp", "zero"])
def test_ranks_run_in_step_where_a_pass_is_collective(how: str) -> None:
    wanted = evaluate_sharded("plain")
    first, second = run_ranks(evaluate_sharded, 2, how, timeout=60)
    for one, mine, theirs in zip(wanted, first, second, strict=True):
        assert mine[0] == theirs[0] == one[0]
        num_images = len(one[2])
        # Each image counts once, and neighbours stay together.
        assert (mine[2], theirs[2]) == (list(range(num_images // 2)), list(range(num_images // 2, num_images)))
    # Passes of two windows for each of the images with 1, 6, 2, 4 and 9 windows: 1, 3, 1, 2 and 5.
    assert [len(passes) for _, passes, _ in wanted] == [12, len(wanted[1][1]), 2]
    if how == "plain":
        assert [first[0][1], second[0][1]] == [[1, 2, 2, 2], [2, 2, 2, 2, 2, 2, 2, 1]]
        assert first[2][1] == []
    else:
        # The rounds are 1 and 1, 3 and 2, none and 5; a spare pass has one window.
        assert first[0][1] == [1, 2, 2, 2, 1, 1, 1, 1, 1]
        assert second[0][1] == [2, 2, 2, 1, 2, 2, 2, 2, 1]
        assert len(first[1][1]) == len(second[1][1]) > 20
        assert (first[2][1], second[2][1]) == ([1, 1], [2, 2])


def pass_together(num_passes: int) -> int:
    """Passes that are a collective each; gives how many this rank ran."""
    total = torch.zeros(())

    def forward(spare: Tensor) -> tuple[Tensor, ...]:
        total.add_(1)
        dist.all_reduce(spare.clone())
        return (spare,)

    mine = num_passes * dist.get_rank()
    with in_step(forward, True, mine, torch.zeros(1)):
        for _ in range(mine):
            forward(torch.zeros(1))
    with in_step(forward, False, mine, torch.zeros(1)):
        pass
    return int(total)


@pytest.mark.distributed
def test_ranks_with_less_to_do_make_up_for_it() -> None:
    assert run_ranks(pass_together, 3, 2, timeout=30) == [4, 4, 4]
