"""Each named transform against the published pipeline, written out with torchvision's first transforms."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode

from spt_dist import UserError
from spt_dist.data.pictures import PicturePreparation
from spt_dist.data.samples import RawSample
from spt_dist.data.transforms import TRANSFORMS, LegacyBilinear, named_transform
from tests.data.pictures_for_tests import encode, noise

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
IMAGENET = v1.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
INCEPTION = v1.Normalize([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])

HELD_OUT = {
    "vtab": [v1.Resize((224, 224), BICUBIC), v1.CenterCrop(224), v1.ToTensor(), IMAGENET],
    "vtab_inception": [v1.Resize((224, 224), BICUBIC), v1.CenterCrop(224), v1.ToTensor(), INCEPTION],
    "vtab_raw": [v1.Resize((224, 224), BICUBIC), v1.ToTensor()],
    "vtab_ssf": [v1.Resize(224, BICUBIC), v1.CenterCrop(224), v1.ToTensor(), INCEPTION],
    "fgvc": [v1.Resize(256), v1.CenterCrop(224), v1.ToTensor(), IMAGENET],
    "fgvc_spt": [v1.Resize((256, 256), BICUBIC), v1.CenterCrop(224), v1.ToTensor(), IMAGENET],
    "fgvc_paper": [v1.Resize(256), v1.CenterCrop(224), v1.ToTensor(), IMAGENET],
    "fgvc_ssf": [v1.Resize(248, BICUBIC), v1.CenterCrop(224), v1.ToTensor(), INCEPTION],
}
FLIP = v1.RandomHorizontalFlip(0.5)
TRAIN = {
    "fgvc": [v1.Resize(256), v1.RandomCrop(224), FLIP, v1.ToTensor(), IMAGENET],
    "fgvc_spt": [v1.Resize((256, 256), BICUBIC), v1.RandomCrop(224), FLIP, v1.ToTensor(), IMAGENET],
    "fgvc_paper": [v1.RandomResizedCrop(224), FLIP, v1.ToTensor(), IMAGENET],
}
SIZES = [(300, 200), (200, 500), (60, 45), (224, 224), (256, 257)]


def prepared(name: str, picture: Image.Image, epoch: int | None, index: int, on_device: bool = False) -> Tensor:
    preparation = PicturePreparation(name, 224, on_device)
    item, _ = preparation.prepare(RawSample("a.png", encode(picture), 0), epoch, index)
    return preparation.finish([item], epoch, [index])[0]


def seeded(epoch: int, index: int, pipeline: Callable[[Image.Image], Tensor], picture: Image.Image) -> Tensor:
    torch.manual_seed(int(np.random.SeedSequence((epoch, index)).generate_state(1)[0]))
    return pipeline(picture)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_images_are_the_published_ones_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    picture = noise(*size)
    assert torch.equal(prepared(name, picture, None, 3), v1.Compose(HELD_OUT[name])(picture))


@pytest.mark.parametrize("name", sorted(set(HELD_OUT) - set(TRAIN) - {"fgvc_ssf"}))
def test_without_augmentation_training_images_are_seen_as_held_out_ones(name: str) -> None:
    picture = noise(90, 70)
    assert torch.equal(prepared(name, picture, 7, 3), v1.Compose(HELD_OUT[name])(picture))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TRAIN)
def test_training_images_are_the_published_ones_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    picture = noise(*size)
    for epoch, index in [(0, 0), (0, 1), (5_000_015, 1)]:
        expected = seeded(epoch, index, v1.Compose(TRAIN[name]), picture)
        assert torch.equal(prepared(name, picture, epoch, index), expected)


def test_ssf_resizes_crops_one_way_or_the_other() -> None:
    picture, found = noise(300, 200), []
    for index in range(12):
        ways = []
        for mode in (BILINEAR, BICUBIC):
            crop = v1.Compose([v1.RandomResizedCrop(224, interpolation=mode), FLIP, v1.ToTensor(), INCEPTION])

            def after_choice(image: Image.Image, crop: Callable[[Image.Image], Tensor] = crop) -> Tensor:
                torch.multinomial(torch.ones(2), 1)
                return crop(image)

            ways.append(seeded(2, index, after_choice, picture))
        image = prepared("fgvc_ssf", picture, 2, index)
        found.append([torch.equal(image, way) for way in ways])
    assert all(sum(each) == 1 for each in found)
    assert {each.index(True) for each in found} == {0, 1}


def test_other_sizes_keep_the_published_share_of_the_edge() -> None:
    # KMnP/vpt has 512 for 448 and 438 for 384.
    picture = noise(600, 520)
    for size, edge in ((448, 512), (384, 438)):
        preparation = PicturePreparation("fgvc", size)
        item, _ = preparation.prepare(RawSample("a.png", encode(picture), 0), None, 0)
        expected = v1.Compose([v1.Resize(edge), v1.CenterCrop(size), v1.PILToTensor()])(picture)
        assert torch.equal(item, expected)


def by_hand(image_CHW: np.ndarray, size: int) -> np.ndarray:
    """Bilinear interpolation between corners, pixel by pixel in fp64."""
    num_channels, height, width = image_CHW.shape
    result = np.zeros((num_channels, size, size))
    for row in range(size):
        for column in range(size):
            y, x = row * height / size, column * width / size
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = image_CHW[:, y0, x0] * (1 - (x - x0)) + image_CHW[:, y0, x1] * (x - x0)
            bottom = image_CHW[:, y1, x0] * (1 - (x - x0)) + image_CHW[:, y1, x1] * (x - x0)
            result[:, row, column] = top * (1 - (y - y0)) + bottom * (y - y0)
    return result


@pytest.mark.parametrize("shape", [(5, 9), (16, 16), (40, 31), (1, 3)])
def test_legacy_bilinear_by_hand(shape: tuple[int, int]) -> None:
    image_CHW = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    expected = by_hand(image_CHW.astype(float), 16)
    for image in (torch.from_numpy(image_CHW), Image.fromarray(image_CHW.transpose(1, 2, 0))):
        np.testing.assert_allclose(LegacyBilinear(16)(image).numpy(), expected, atol=2e-4)


def test_legacy_bilinear_has_no_half_pixels() -> None:
    two = torch.tensor([[[0, 100]]], dtype=torch.uint8).expand(3, 1, 2)
    # With centres it would be 0, 25, 75, 100.
    assert LegacyBilinear(4)(two)[0, 0].tolist() == [0, 50, 100, 100]


def test_vtab_vpt_is_not_rounded() -> None:
    picture = noise(50, 40)
    image_HWC = np.asarray(picture).astype(float)
    grey_CHW = by_hand(image_HWC.transpose(2, 0, 1), 224)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (grey_CHW / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(prepared("vtab_vpt", picture, None, 0).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_on_the_device_crops_and_flips_are_the_same(name: str) -> None:
    """Another crop of these images would differ by tens of grey levels; torch's resizing differs from Pillow's by 2."""
    std_C11 = torch.tensor(named_transform(name).normalisation.std).view(3, 1, 1)
    for number, size in enumerate(SIZES):
        for epoch in (None, 0, 4):
            picture = noise(*size, seed=number)
            worker, device = (prepared(name, picture, epoch, number, on_device) for on_device in (False, True))
            levels = (worker - device) * std_C11 * 255
            assert levels.abs().max() < 2.01
            assert levels.abs().mean() < 0.2


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", ["vtab", "fgvc", "fgvc_ssf"])
def test_random_numbers_of_the_process_stay_as_they_were(name: str, on_device: bool) -> None:
    def states() -> tuple[list[int], str, str]:
        return torch.get_rng_state().tolist(), str(random.getstate()), str(np.random.get_state())

    before = states()
    prepared(name, noise(300, 200), 1, 2, on_device)
    assert states() == before


@pytest.mark.parametrize("on_device", [False, True])
def test_each_epoch_and_sample_has_its_own_crop(on_device: bool) -> None:
    picture = noise(300, 200)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    images = [prepared("fgvc_paper", picture, epoch, index, on_device) for epoch, index in keys]
    assert all(not torch.equal(images[a], images[b]) for a in range(4) for b in range(a))
    assert torch.equal(images[2], prepared("fgvc_paper", picture, 1, 0, on_device))


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"data\.transform='fvgc' is unknown; did you mean 'fgvc'"):
        PicturePreparation("fvgc", 224)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_normalises_to_the_same_bits() -> None:
    for name, on_device in (("vtab", False), ("fgvc", True)):
        preparation = PicturePreparation(name, 224, on_device)
        item, _ = preparation.prepare(RawSample("a.png", encode(noise(300, 200)), 0), 2, 1)
        on_cpu, on_gpu = preparation.finish([item], 2, [1]), preparation.finish([item.cuda()], 2, [1])
        if on_device:
            levels = (on_cpu - on_gpu.cpu()) * torch.tensor(named_transform(name).normalisation.std).view(3, 1, 1) * 255
            assert levels.abs().max() < 2.01
        else:
            assert torch.equal(on_cpu, on_gpu.cpu())
