import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from spt_dist import UserError
from spt_dist.data.pictures import MAX_PIXELS, PicturePreparation, decode
from spt_dist.data.samples import BadSampleError, RawSample
from tests.data.pictures_for_tests import encode, noise


def published(content: bytes) -> np.ndarray:
    """torchvision's default_loader."""
    return np.asarray(Image.open(BytesIO(content)).convert("RGB"))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


MODES = {
    "JPEG": ["RGB", "L", "CMYK"],
    "PNG": ["RGB", "L", "P", "RGBA", "LA", "1"],
    "WEBP": ["RGB", "RGBA"],
    "BMP": ["RGB", "L", "P", "RGBA", "1"],
    "GIF": ["RGB", "L", "P", "RGBA"],
    "TIFF": ["RGB", "L", "P", "CMYK", "RGBA", "LA", "1"],
    "PPM": ["RGB", "L", "1"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_any_mode_becomes_rgb_as_the_published_readers_make_it(kind: str, mode: str) -> None:
    image = noise(40, 30).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(noise(40, 30, seed=1).convert("L"))
    content = encode(image, kind)
    decoded = decode(content, "a")
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), published(content))


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    image = noise(40, 30).quantize(16)
    content = encode(image, transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(content, "a")
    assert np.array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_eight_are_kept(kind: str) -> None:
    grey_HW = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    decoded = np.asarray(decode(encode(Image.fromarray(grey_HW), kind), "a"))
    # Pillow's own conversion makes all above 255 white.
    assert np.array_equal(decoded, np.repeat((grey_HW // 256)[..., None], 3, axis=2))


def test_32_bits_are_refused() -> None:
    content = encode(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(BadSampleError, match=r"^a\.tif: has 32 bits a pixel; save it with 8$"):
        decode(content, "a.tif")


def test_an_image_is_not_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(noise(40, 30), "JPEG", exif=exif), "a").size == (40, 30)


@pytest.mark.parametrize("kind", MODES)
def test_a_file_that_is_cut_off_is_refused(kind: str) -> None:
    content = encode(noise(64, 48), kind)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(BadSampleError, match=r"^cut: (can't be decoded|is no image)"):
            decode(content[: int(len(content) * share)], "cut")


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(BadSampleError, match=r"^a\.jpg: is no image \(JPEG, PNG, "):
        decode(b"images/000.jpg 3\n", "a.jpg")
    with pytest.raises(BadSampleError, match=r"^a\.jpg: is empty$"):
        decode(b"", "a.jpg")


def test_only_named_formats_are_opened() -> None:
    """Pillow would run Ghostscript for this one."""
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    assert Image.open(BytesIO(content)).format == "EPS"
    with pytest.raises(BadSampleError, match="is no image"):
        decode(content, "a.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8193, 8192), (10_000, 10_000), (60_000, 60_000)])
def test_bombs_are_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    content = png_header(*size)
    assert len(content) < 100
    with pytest.raises(BadSampleError, match=r"^bomb\.png: (has .* pixels; at most 67,108,864 are read|can't be dec)"):
        decode(content, "bomb.png")


def test_the_bound_is_inclusive() -> None:
    content = encode(noise(10, 10))
    assert decode(content, "a", max_pixels=100).size == (10, 10)
    with pytest.raises(BadSampleError, match="has 10 x 10 pixels; at most 99 are read"):
        decode(content, "a", max_pixels=99)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_line_is_not_enlarged_to_gigabytes(on_device: bool) -> None:
    preparation = PicturePreparation("fgvc", 224, on_device)
    line = RawSample("line.png", encode(Image.new("RGB", (1, 20_000))), 0)
    with pytest.raises(BadSampleError, match=r"line\.png: has 1 x 20000 pixels, too narrow for data\.image_size=224"):
        preparation.prepare(line, None, 0)
    longest = MAX_PIXELS // 256**2
    item, _ = preparation.prepare(RawSample("a", encode(Image.new("RGB", (1, longest))), 0), None, 0)
    assert preparation.finish([item], None, [0]).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("name", ["vtab", "vtab_vpt", "fgvc"])
def test_an_item_is_grey_levels_and_the_label(name: str) -> None:
    preparation = PicturePreparation(name, 32)
    item, label = preparation.prepare(RawSample("a", encode(noise(50, 40)), 7), 1, 0)
    blank, zero = preparation.blank()
    assert (label, zero) == (7, 0)
    assert item.dtype == blank.dtype == (torch.float32 if name == "vtab_vpt" else torch.uint8)
    assert item.shape == blank.shape == (3, 32, 32)
    assert item.is_contiguous()
    assert not blank.any()
    # No view of the decoder's memory, and nothing else behind it that would be sent between processes.
    assert item.untyped_storage().nbytes() == item.nbytes


def test_on_the_device_an_item_is_the_whole_image() -> None:
    preparation = PicturePreparation("fgvc", 32, on_device=True)
    picture = noise(50, 40)
    item, _ = preparation.prepare(RawSample("a", encode(picture), 7), 1, 0)
    assert torch.equal(item, pil_to_tensor(picture))
    other, _ = preparation.prepare(RawSample("b", encode(noise(33, 70)), 7), 1, 1)
    finished = preparation.finish([item, other, preparation.blank()[0]], 1, [0, 1, 2])
    assert finished.shape == (3, 3, 32, 32)
    assert finished.dtype == torch.float32


def test_finishing_leaves_the_inputs_as_they_were() -> None:
    preparation = PicturePreparation("vtab_vpt", 32)
    item, _ = preparation.prepare(RawSample("a", encode(noise(50, 40)), 7), 1, 0)
    before = item.clone()
    preparation.finish([item], 1, [0])
    assert torch.equal(item, before)


def test_what_is_random() -> None:
    assert PicturePreparation("fgvc", 32).is_random
    assert PicturePreparation("fgvc", 32, on_device=True).is_random
    assert not PicturePreparation("vtab", 32).is_random


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.image_size=0 has to be at least 1"):
        PicturePreparation("vtab", 0)
