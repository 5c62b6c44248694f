"""Patches of photographs that ship inside scikit-learn and scikit-image.

A photograph is divided into square blocks like a chessboard. Patches lie within a block: of the white ones for testing,
of the black ones for training and, every fifth of these, for validation. So no pixel is both trained on and held out.

Shape suffixes: H rows, W columns, C colour channels.
"""

from typing import Any, Final

import numpy as np
from PIL import Image

from spt_dist.data.mini.canvas import IMAGE_SIZE, Draw, Floats, Pixels, lit, to_pixels
from spt_dist.errors import UserError

BLOCK: Final = 56
"""Side of a block, in pixels of the photograph as ``load_photo`` gives it."""
_LONGEST: Final = 640
_SMALLEST: Final = 40
_TRIES: Final = 3
_VALIDATION_SHARE: Final = 5

PHOTOS: Final[dict[str, str]] = {
    "astronaut": "astronaut",
    "camera": "camera",
    "cat": "chelsea",
    "coffee": "coffee",
    "coins": "coins",
    "galaxies": "hubble_deep_field",
    "page": "page",
    "retina": "retina",
    "rocket": "rocket",
    "tissue": "immunohistochemistry",
    "flower": "flower.jpg",
    "temple": "china.jpg",
}
"""Class -> its picture: a function of skimage.data, or a file that scikit-learn has."""


def load_photo(name: str) -> Pixels:
    """A photograph, RGB ``(H, W, 3)``, reduced to at most 640 pixels on its longer side.

    Args:
        name: as in the values of ``PHOTOS``.

    Raises:
        UserError: scikit-learn or scikit-image isn't installed.
    """
    try:
        if name.endswith(".jpg"):
            from sklearn.datasets import load_sample_image

            pixels = load_sample_image(name)
        else:
            from skimage import data

            pixels = getattr(data, name)()
    except ImportError as error:
        library = "scikit-learn" if name.endswith(".jpg") else "scikit-image"
        raise UserError(
            f"the photograph {name!r} comes with {library}, which is not installed: "
            "pip install 'spt_dist[mini]', or make only tasks that need none"
        ) from error
    image = Image.fromarray(pixels).convert("RGB")
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.BOX)
    return np.asarray(image)


def blocks_of(shape: tuple[int, ...], split: str) -> list[tuple[int, int]]:
    """The blocks of a picture that a split's patches come from: row and column of their upper left corners."""
    found = []
    num_black = 0
    for row in range(shape[0] // BLOCK):
        for column in range(shape[1] // BLOCK):
            owner = "test"
            if (row + column) % 2 == 0:
                num_black += 1
                owner = "val" if num_black % _VALIDATION_SHARE == 0 else "train"
            if owner == split:
                found.append((row * BLOCK, column * BLOCK))
    return found


def draw_patch(rng: np.random.Generator, photo: Pixels, split: str, smallest: int) -> Pixels:
    """A square within one of the split's blocks, perhaps mirrored, reduced to 32 x 32 pixels.

    Args:
        rng: chooses it.
        photo: ``(H, W)`` or ``(H, W, 3)``.
        split: "train", "val" or "test".
        smallest: its least side, in pixels of the photograph.
    """
    blocks = blocks_of(photo.shape, split)
    block_top, block_left = blocks[rng.integers(len(blocks))]
    side = int(rng.integers(smallest, BLOCK + 1))
    top, left = block_top + rng.integers(BLOCK - side + 1), block_left + rng.integers(BLOCK - side + 1)
    patch = photo[top : top + side, left : left + side]
    if rng.random() < 0.5:
        patch = patch[:, ::-1]
    resized: Any = Image.fromarray(patch).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def _in_other_light(rng: np.random.Generator, image_HWC: Floats) -> Floats:
    """The picture with other colours, brightness and contrast, so that these alone don't tell it."""
    grey_HW1 = image_HWC.mean(axis=-1, keepdims=True)
    saturation = rng.uniform(0, 1)
    image_HWC = grey_HW1 + saturation * (image_HWC - grey_HW1)
    image_HWC = image_HWC * rng.uniform(0.75, 1.25, 3)
    contrast, brightness = rng.uniform(0.6, 1.4), rng.uniform(-0.15, 0.15)
    return (image_HWC - image_HWC.mean()) * contrast + image_HWC.mean() + brightness


def photos_task() -> Draw:
    """Which photograph a patch is from."""
    photos = [load_photo(name) for name in PHOTOS.values()]

    def draw(rng: np.random.Generator, split: str, number: int) -> tuple[Pixels, int]:
        label = int(rng.integers(len(photos)))
        # Much of a sky is of one colour and could be of any photograph.
        patch = max((draw_patch(rng, photos[label], split, _SMALLEST) for _ in range(_TRIES)), key=np.std)
        return to_pixels(rng, lit(rng, _in_other_light(rng, patch / 255), 0.2), 0.04), label

    return draw
