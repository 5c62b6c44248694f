"""How images with masks become samples for training and evaluation, by way of mmseg's transforms.

Shape suffixes: C channels (red, green, blue), H rows, W columns. Arrays of mmseg's are HWC, and blue comes first.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
import torch
from mmseg.registry import TRANSFORMS
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info

from spt_dist.data.pairs import check_size, read_mask
from spt_dist.data.samples import BadSampleError, Item
from spt_dist.errors import UserError

IGNORED: Final = 255
Info = dict[str, Any]
"""What mmseg's transforms begin with: the paths ``img_path`` and ``seg_map_path``, and how labels are meant."""


@dataclass(frozen=True)
class MaskedSettings:
    """How images become samples.

    Attributes:
        crop_size: height and width of a training sample; what is smaller is filled up to it.
        scale: most pixels of the longer and of the shorter edge of an image that is seen whole.
        mean, std: of red, green and blue, in grey levels.
        pipeline: configs of mmseg's transforms, from the files to the crop.
        seed: of the random transforms.
        advice: what can be done about a bad sample, for its error.
    """

    crop_size: tuple[int, int]
    scale: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pipeline: tuple[dict[str, Any], ...]
    seed: int
    advice: str


class MaskedImages:
    """What is made of images with masks. Labels are int64: a class, or 255 where a pixel counts for none.

    Args:
        settings: how.
        classes, palette: name and colour of each class.

    Raises:
        UserError: mmseg can't build the pipeline.
    """

    def __init__(self, settings: MaskedSettings, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> None:
        self.settings = settings
        self.classes: tuple[str, ...] = tuple(classes)
        self.palette: list[list[int]] = [list(colour) for colour in palette]
        self._random = [
            build_transform(config, f"data.train_pipeline[{place}]") for place, config in enumerate(settings.pipeline)
        ]
        self._loading = [build_transform({"type": name}, name) for name in ("LoadImageFromFile", "LoadAnnotations")]
        self._mean_C11 = torch.tensor(settings.mean).view(-1, 1, 1)
        self._std_C11 = torch.tensor(settings.std).view(-1, 1, 1)

    def picture(self, info: Info) -> npt.NDArray[np.uint8]:
        """The image as it is in the file: RGB uint8 ``(H, W, 3)``."""
        image_HWC: npt.NDArray[np.uint8] = self._load(info, self._loading)["img"]
        return np.ascontiguousarray(image_HWC[..., ::-1])

    def crop(self, info: Info, epoch: int | None, index: int) -> Item:
        """A training sample: an image, fp32 ``(3, H, W)``, and its label, int64 ``(H, W)``, of the size of a crop.

        It depends on seed, epoch and index alone, and leaves the random numbers of the process as they were.

        Raises:
            BadSampleError: the files are not what they should be.
            UserError: the pipeline leaves more than a crop.
        """
        assert epoch is not None, "held-out images are seen whole"
        settings = self.settings
        with _random_state(settings.seed, epoch, index):
            results = self._load(info, self._random)
        label_HW = torch.from_numpy(results["gt_seg_map"].astype(np.int64))
        missing = [wanted - size for wanted, size in zip(settings.crop_size, label_HW.shape, strict=True)]
        if min(missing) < 0:
            raise UserError(
                f"config: data.train_pipeline leaves {tuple(label_HW.shape)} pixels of {info['img_path']}, more "
                f"than data.crop_size={settings.crop_size}; add a RandomCrop to it"
            )
        # Only now, so that what is filled in is neither shade nor colour: 0 is the mean.
        padding = (0, missing[1], 0, missing[0])
        return F.pad(self._normalised(results["img"]), padding), F.pad(label_HW, padding, value=IGNORED)

    def blank(self) -> Item:
        """A black image, all of whose pixels are ignored."""
        height, width = self.settings.crop_size
        return torch.zeros(3, height, width), torch.full((height, width), IGNORED)

    def whole(self, info: Info, resizes: Sequence[Any]) -> tuple[list[Tensor], Tensor]:
        """The whole image in several sizes, fp32 ``(3, H, W)``, and its label at its original size, int64 ``(H, W)``.

        Args:
            info: the sample.
            resizes: transforms, each of which makes one size; see ``resizes``.

        Raises:
            BadSampleError: the files are not what they should be.
        """
        results = self._load(info, self._loading)
        images = [resize({"img": results["img"]})["img"] for resize in resizes]
        return [self._normalised(image_HWC) for image_HWC in images], torch.from_numpy(
            results["gt_seg_map"].astype(np.int64)
        )

    def resizes(self, scales: Sequence[float]) -> list[Any]:
        """Transforms that make an image as large as a scale times ``MaskedSettings.scale`` allows, its shape kept."""
        edges = [tuple(int(edge * scale + 0.5) for edge in self.settings.scale) for scale in scales]
        return [build_transform({"type": "Resize", "scale": pair, "keep_ratio": True}, "Resize") for pair in edges]

    def _load(self, info: Info, transforms: Sequence[Any]) -> dict[str, Any]:
        """A sample's files, checked and taken through the transforms."""
        if get_worker_info() is not None:
            # Each worker is one of several, and OpenCV would start threads for all cores in each.
            cv2.setNumThreads(0)
        results = info
        pair = info["img_path"], info["seg_map_path"]
        try:
            mask_HW = read_mask(pair, len(self.classes))
            for transform in transforms:
                results = transform(results)
                # Before a crop of both hides that they don't fit.
                check_size(pair, results.get("ori_shape", mask_HW.shape), mask_HW.shape)
        except BadSampleError as error:
            raise BadSampleError(f"{error}; {self.settings.advice}") from error
        except (AssertionError, cv2.error) as error:
            if "img" in info:
                raise
            raise BadSampleError(f"{pair[0]}: can't be decoded; {self.settings.advice}") from error
        return results

    def _normalised(self, image_HWC: npt.NDArray[Any]) -> Tensor:
        image_CHW = torch.from_numpy(np.ascontiguousarray(image_HWC[..., ::-1].transpose(2, 0, 1))).float()
        return (image_CHW - self._mean_C11) / self._std_C11


def build_transform(config: dict[str, Any], name: str) -> Any:
    """Build one of mmseg's transforms.

    Args:
        config: ``type`` and arguments.
        name: what the config calls it, for the error.

    Raises:
        UserError: there is no such transform, or it does not take these arguments.
    """
    try:
        # mmcv's transforms build others by name, and have to find mmseg's.
        return TRANSFORMS.build({"_scope_": "mmseg", **config})
    # Each transform checks its arguments in its own way, most by `assert`.
    except Exception as error:
        raise UserError(f"config: {name}={config}: {type(error).__name__}: {error}") from error


@contextmanager
def _random_state(*key: int) -> Iterator[None]:
    """For the length of the block the random numbers that mmseg's transforms draw follow from ``key`` alone."""
    states = np.random.get_state(), random.getstate()
    seed = np.random.SeedSequence(key).generate_state(4)
    np.random.seed(seed)
    random.seed(seed.tobytes())
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
