"""Drawn scenes laid out as ADE20K is, so that segmentation can be tried without a download.

A class is told by its texture alone: the direction and form of stripes, checks, dots or grain. Colours, places and
shapes are drawn without regard to it.

Shape suffixes: H rows, W columns, C colour channels.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from spt_dist.data.ade20k_layout import OTHER, SPLITS
from spt_dist.errors import UserError
from spt_dist.progress import progress_bar

Floats = npt.NDArray[np.float32]
Painter = Callable[[np.random.Generator, Floats, Floats], Floats]

MIN_SIZE: Final = 32
JPEG_QUALITY: Final = 95
_LEAN: Final = 0.12


def _wave(rng: np.random.Generator, across_HW: Floats, shortest: float, longest: float) -> Floats:
    """A sine of random length (pixels) and phase along ``across_HW``, -1 to 1."""
    length, phase = rng.uniform(shortest, longest), rng.uniform(0, 2 * np.pi)
    return np.sin(np.float32(2 * np.pi / length) * across_HW + np.float32(phase))


def _turned(y_HW: Floats, x_HW: Floats, angle: float) -> tuple[Floats, Floats]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * y_HW - sin * x_HW, sin * y_HW + cos * x_HW


def _stripes(degrees: float) -> Painter:
    """Straight stripes, 0 degrees for level ones; rising or falling where that makes a difference.

    A texture means the same class when the scene is mirrored, as augmentation does.
    """

    def paint(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
        angle = rng.choice((-1, 1)) * np.radians(degrees) + rng.uniform(-_LEAN, _LEAN)
        across_HW, _ = _turned(y_HW, x_HW, angle)
        return 0.5 + 0.5 * _wave(rng, across_HW, 4.5, 8)

    return paint


def _checks(degrees: float) -> Painter:
    def paint(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
        y_HW, x_HW = _turned(y_HW, x_HW, np.radians(degrees) + rng.uniform(-_LEAN, _LEAN))
        return 0.5 + 1.5 * _wave(rng, y_HW, 7, 11) * _wave(rng, x_HW, 7, 11)

    return paint


def _panes(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Thin lines in both directions."""
    return 4 * np.maximum(_wave(rng, y_HW, 8, 12), _wave(rng, x_HW, 8, 12)) - 3


def _bricks(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Thin lines again, but the upright ones end at the next level line and go on half-way between two others."""
    height, shift = rng.uniform(4, 6), rng.uniform(0, 20, 2).astype(np.float32)
    width = 2 * height
    y_HW, x_HW = y_HW + shift[0], x_HW + shift[1]
    is_odd_HW = (y_HW // height) % 2
    is_joint_HW = (y_HW % height < 1.5) | ((x_HW + is_odd_HW * width / 2) % width < 1.5)
    return is_joint_HW.astype(np.float32)


def _dots(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    return 1.5 * (_wave(rng, y_HW, 6, 9) + _wave(rng, x_HW, 6, 9)) - 1


def _ripples(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Level stripes that go up and down."""
    return 0.5 + 0.5 * _wave(rng, y_HW + 2.5 * _wave(rng, x_HW, 13, 20), 5, 8)


def _grain(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Each pixel for itself."""
    return rng.random(y_HW.shape, dtype=np.float32)


def _foliage(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Blots some five pixels wide."""
    height, width = y_HW.shape
    step = rng.uniform(4, 6)
    coarse = rng.random((int(height / step) + 2, int(width / step) + 2), dtype=np.float32)
    enlarged_HW: Floats = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return 0.5 + 2 * (enlarged_HW - 0.5)


def _gradient(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """No texture, only a slow change of shade."""
    across_HW, _ = _turned(y_HW, x_HW, rng.uniform(0, 2 * np.pi))
    low, high = across_HW.min(), across_HW.max()
    return (across_HW - low) / np.float32(high - low + 1)


# Names as in ADE20K; the number is the value in the masks.
TEXTURES: Final[dict[int, tuple[str, Painter]]] = {
    1: ("wall", _stripes(0)),
    2: ("building", _bricks),
    3: ("sky", _gradient),
    4: ("floor", _checks(0)),
    5: ("tree", _foliage),
    6: ("ceiling", _dots),
    9: ("windowpane", _panes),
    15: ("door", _stripes(90)),
    22: ("water", _ripples),
    29: ("rug", _checks(45)),
    33: ("fence", _stripes(45)),
    47: ("sand", _grain),
}


def _flat(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    return np.zeros_like(y_HW)


def _object(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> npt.NDArray[np.bool_]:
    """The pixels of an ellipse, a rectangle or a polygon somewhere in the scene."""
    height, width = y_HW.shape
    size = min(height, width)
    y_HW, x_HW = y_HW - np.float32(rng.uniform(0, height)), x_HW - np.float32(rng.uniform(0, width))
    y_HW, x_HW = _turned(y_HW, x_HW, rng.uniform(0, np.pi))
    half_height, half_width = rng.uniform(0.14, 0.32, 2).astype(np.float32) * size
    kind = rng.integers(3)
    if kind == 0:
        return (y_HW / half_height) ** 2 + (x_HW / half_width) ** 2 < 1
    if kind == 1:
        return (np.abs(y_HW) < half_height) & (np.abs(x_HW) < half_width)
    # Where as many half-planes meet: three to six, whose normals go round once.
    sides = rng.integers(3, 7)
    angles = (np.arange(sides) + rng.uniform(0, 0.6, sides)) * 2 * np.pi / sides
    inside_HW = np.ones(y_HW.shape, dtype=bool)
    for angle in angles:
        inside_HW &= np.float32(np.sin(angle)) * y_HW + np.float32(np.cos(angle)) * x_HW < half_height
    return inside_HW


def _regions(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> npt.NDArray[np.intp]:
    """Which region each pixel belongs to: two or three of background, and three to six objects before it."""
    height, width = y_HW.shape
    regions_HW = np.zeros(y_HW.shape, dtype=np.intp)
    angle, num_lines = rng.uniform(0, np.pi), rng.integers(1, 3)
    for _ in range(num_lines):
        across_HW, _along_HW = _turned(
            y_HW - np.float32(height * rng.uniform(0.2, 0.8)),
            x_HW - np.float32(width * rng.uniform(0.2, 0.8)),
            angle + rng.uniform(-0.4, 0.4),
        )
        regions_HW += across_HW > 0
    for number in range(num_lines + 1, num_lines + 1 + rng.integers(3, 7)):
        regions_HW[_object(rng, y_HW, x_HW)] = number
    return regions_HW


def _two_colours(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Two colours whose brightness differs clearly, either of them the brighter one; each ``(3,)``, 0 to 1."""
    middle, half_contrast = rng.uniform(0.35, 0.65), rng.uniform(0.14, 0.3) * rng.choice((-1, 1))
    hues_2C = rng.uniform(-0.3, 0.3, (2, 3))
    hues_2C -= hues_2C.mean(axis=1, keepdims=True)
    colours_2C = middle + np.array([[half_contrast], [-half_contrast]]) + hues_2C
    first_C, second_C = colours_2C.clip(0, 1).astype(np.float32)
    return first_C, second_C


def draw_scene(seed: tuple[int, ...], size: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draw a scene; the same arguments always give the same one.

    Args:
        seed: non-negative integers.
        size: about how high it is, in pixels; scenes differ by a few, and most are wider than high.

    Returns:
        image, RGB uint8 ``(H, W, 3)``, and mask, uint8 ``(H, W)``: 0 for "other", else a key of ``TEXTURES``.
    """
    rng = np.random.default_rng(seed)
    height, width = (round(size * rng.uniform(low, high)) for low, high in ((0.9, 1.1), (0.9, 1.4)))
    y_HW, x_HW = np.indices((height, width), dtype=np.float32)
    regions_HW = _regions(rng, y_HW, x_HW)
    num_regions = int(regions_HW.max()) + 1
    # Each label once before any comes again, so that neighbours differ.
    labels = rng.permutation([OTHER, *TEXTURES])[:num_regions].astype(np.uint8)
    image_HWC = np.empty((height, width, 3), dtype=np.float32)
    for number, label in enumerate(labels):
        paint = TEXTURES[int(label)][1] if label != OTHER else _flat
        first_C, second_C = _two_colours(rng)
        share_HW1 = paint(rng, y_HW, x_HW).clip(0, 1)[..., None]
        inside_HW = regions_HW == number
        image_HWC[inside_HW] = (second_C + share_HW1 * (first_C - second_C))[inside_HW]
    light_HW1 = _gradient(rng, y_HW, x_HW)[..., None] - np.float32(0.5)
    image_HWC += np.float32(rng.uniform(0, 0.2)) * light_HW1
    image_HWC += np.float32(rng.uniform(0, 0.03)) * rng.standard_normal(image_HWC.shape, dtype=np.float32)
    return np.round(255 * image_HWC.clip(0, 1)).astype(np.uint8), labels[regions_HW]


def make_scenes(
    root: str | Path, num_train: int = 400, num_val: int = 80, size: int = 96, seed: int = 0, show_progress: bool = True
) -> Path:
    """Write scenes as ADE20K's folders and files; training and validation have no scene in common.

    All of it appears at once, when the last file is written.

    Args:
        root: the folder; it may be there if it is empty.
        num_train, num_val: how many scenes.
        size: about how high each is, in pixels.
        seed: other seeds draw other scenes.
        show_progress: whether to show a bar.

    Returns:
        ``root``.

    Raises:
        UserError: ``root`` has files or is one; a number is too small.
        OSError: of the file system.
    """
    for name, value, least in (("num-train", num_train, 1), ("num-val", num_val, 1), ("size", size, MIN_SIZE)):
        if value < least:
            raise UserError(f"--{name} {value}: has to be at least {least}")
    if seed < 0:
        raise UserError(f"--seed {seed}: has to be 0 or more")
    # Not through a link's name: what is renamed in the end has to lie beside the folder itself.
    root = Path(root).resolve()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root}: is there already; scenes go into a new or an empty folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as temporary:
        made = Path(temporary, "made")
        with progress_bar("drawing scenes", num_train + num_val, show_progress) as bar:
            for number, (split, count) in enumerate((("training", num_train), ("validation", num_val))):
                files = SPLITS[split]
                images, masks = made / files.images, made / files.masks
                images.mkdir(parents=True)
                masks.mkdir(parents=True)
                for scene in range(1, count + 1):
                    image_HWC, mask_HW = draw_scene((seed, number, scene), size)
                    name = f"{files.prefix}_{scene:08d}"
                    Image.fromarray(image_HWC).save(images / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)
                    Image.fromarray(mask_HW).save(masks / f"{name}.png")
                    bar.advance()
        made.rename(root)
    return root
