"""Sliding windows against mmseg's own.

Shape suffixes: N images or windows, C channels, K classes, H height, W width; h, w of a window.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import UserError
from spt_dist.evaluation.windows import image_logits, lay_windows
from tests.evaluation.segmentation_for_tests import CLASSES, SLIDE, make_setr

# Sizes below the crop in one or both axes, equal to it, one pixel more, a whole number of strides more, and large.
SIZES = [(20, 20), (20, 90), (64, 33), (32, 48), (33, 49), (32 + 2 * 13, 48 + 2 * 29), (101, 152)]
GRID = {"mode": "slide", "crop_size": (32, 48), "stride": (13, 29)}


def mmseg_windows(height: int, width: int, test_cfg: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """``(top, left, height, width)`` of each crop that mmseg passes to the model."""
    segmentors = pytest.importorskip("mmseg.models.segmentors")
    seen = []

    def encode_decode(crop: Tensor, metas: list[dict[str, Any]]) -> Tensor:
        top, left = crop[0, :, 0, 0].int().tolist()
        seen.append((top, left, crop.shape[2], crop.shape[3]))
        return crop[:, :1]

    # A pixel's values are its own place.
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))[None].float()
    model = SimpleNamespace(test_cfg=SimpleNamespace(**test_cfg), out_channels=1, encode_decode=encode_decode)
    segmentors.EncoderDecoder.slide_inference(model, places, [{}])
    return seen


@pytest.mark.segmentation
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_windows_are_those_of_mmseg(height: int, width: int) -> None:
    found = lay_windows((height, width), GRID)
    wanted = mmseg_windows(height, width, GRID)
    assert [(top, left, found.height, found.width) for top, left in found.corners] == wanted


def test_whole_mode_is_one_window() -> None:
    found = lay_windows((70, 90), {"mode": "whole", "crop_size": (32, 32), "stride": (21, 21)})
    assert (found.corners, found.height, found.width) == ([(0, 0)], 70, 90)


@pytest.mark.segmentation
@pytest.mark.filterwarnings("ignore::UserWarning:mm")
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("test_cfg", [SLIDE, {"mode": "whole"}], ids=lambda test_cfg: test_cfg["mode"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (56, 73)])
def test_logits_are_those_of_mmseg(align_corners: bool, test_cfg: dict[str, Any], height: int, width: int) -> None:
    pytest.importorskip("mmseg")
    model = make_setr(test_cfg, align_corners)
    image_CHW = torch.randn(3, height, width)
    shape = {"ori_shape": (height, width), "img_shape": (height, width), "pad_shape": (height, width)}
    with torch.no_grad():
        (wanted_KHW,) = model.inference(image_CHW[None], [shape])
        for windows_per_pass in (1, 2, 100):
            found_KHW = image_logits(model, model, image_CHW, windows_per_pass)
            assert found_KHW.shape == (len(CLASSES), height, width)
            # Matrices are multiplied in another order where there are more rows.
            exactly = {"rtol": 0.0, "atol": 0.0} if windows_per_pass == 1 else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(found_KHW, wanted_KHW, **exactly)


class Recorder(nn.Module):
    """Keeps the number of windows of each pass; gives the mean colours of a window's four quarters."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.test_cfg, self.align_corners, self.out_channels, self.dtype = GRID, False, 3, dtype
        self.passes: list[int] = []

    def forward(self, windows_NChw: Tensor) -> tuple[Tensor, ...]:
        self.passes.append(len(windows_NChw))
        logits_NKhw = F.adaptive_avg_pool2d(windows_NChw, 2).to(self.dtype)
        return logits_NKhw, -logits_NKhw


@pytest.mark.parametrize(("windows_per_pass", "wanted"), [(1, [1] * 12), (5, [5, 5, 2]), (12, [12]), (99, [12])])
def test_passes_are_as_many_as_announced(windows_per_pass: int, wanted: list[int]) -> None:
    model = Recorder()
    image_logits(model, model, torch.randn(3, 60, 106), windows_per_pass)
    assert model.passes == wanted
    assert lay_windows((60, 106), GRID).num_passes(windows_per_pass) == len(wanted)


def test_overlapping_windows_are_averaged_pixel_by_pixel_in_fp32() -> None:
    image_CHW = 100 * torch.randn(3, 60, 106)
    model = Recorder(torch.bfloat16)
    found_KHW = image_logits(model, model, image_CHW, windows_per_pass=4)
    sums_KHW, counts_HW = torch.zeros(3, 60, 106, dtype=torch.float64), torch.zeros(60, 106)
    for top in (0, 13, 26, 28):
        for left in (0, 29, 58):
            rows, columns = slice(top, top + 32), slice(left, left + 48)
            quarters_C22 = image_CHW[:, rows, columns].unflatten(2, (2, 24)).unflatten(1, (2, 16)).mean(dim=(2, 4))
            exact_1C22 = quarters_C22.bfloat16().double()[None]
            sums_KHW[:, rows, columns] += F.interpolate(exact_1C22, (32, 48), mode="bilinear")[0]
            counts_HW[rows, columns] += 1
    assert counts_HW.min() == 1
    assert counts_HW.max() > 4
    assert found_KHW.dtype == torch.float32
    torch.testing.assert_close(found_KHW.double(), sums_KHW / counts_HW, rtol=1e-5, atol=1e-5)


def test_gaps_between_windows_are_refused() -> None:
    with pytest.raises(UserError, match=r"test_cfg: stride=\(21, 33\) is larger than crop_size=\(32, 32\)"):
        lay_windows((64, 64), SLIDE | {"stride": (21, 33)})
