"""House numbers made of scikit-learn's handwritten digits: the class is the digit in the middle, as in SVHN.

Shape suffixes: H rows, W columns, C colour channels.
"""

from typing import Final

import numpy as np
from PIL import Image

from spt_dist.data.digits import NUM_DIGITS, read_digits
from spt_dist.data.mini.canvas import IMAGE_SIZE, Draw, Floats, Pixels, coloured, lit, to_pixels, two_colours

STARTS: Final[dict[str, int]] = {"train": 0, "val": 800, "test": 1000}
"""Where the digits of a split begin in scikit-learn's, once these are shuffled."""
NUM_TEST: Final = NUM_DIGITS - STARTS["test"]
_SHUFFLE_SEED: Final = 0


def shuffled_digits() -> tuple[Floats, list[int]]:
    """All 1,797 digits, ``(1797, 8, 8)``, 0 to 1, and their labels, in the order in which the splits take them."""
    images_NHW, labels_N = (values_N.numpy() for values_N in read_digits())
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(NUM_DIGITS)
    return images_NHW[order] / 16, labels_N[order].tolist()


def _placed(digit_HW: Floats, height: float, width: float, row: float, column: float, lean: float) -> Floats:
    """A digit enlarged to ``height`` x ``width`` pixels around (row, column), leaning to the right: ``(32, 32)``."""
    across, down = 8 / width, 8 / height
    # From a pixel of the picture to a point of the digit, as PIL wants it.
    matrix = (across, across * lean, 4 - across * (column + lean * row), 0, down, 4 - down * row)
    image = Image.fromarray(digit_HW.astype(np.float32))
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.asarray(image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC), dtype=np.float64)


def digits_task() -> Draw:
    """The digit in the middle of a house number; those beside it, partly seen, mean nothing.

    A digit is in the middle once, and beside others only in its own split.
    """
    digits_NHW, labels = shuffled_digits()
    ends = {"train": STARTS["val"], "val": STARTS["test"], "test": NUM_DIGITS}

    def draw(rng: np.random.Generator, split: str, number: int) -> tuple[Pixels, int]:
        middle = STARTS[split] + number
        assert middle < ends[split], f"{split} has no digit {number}"
        height, width = rng.uniform(18, 27), rng.uniform(14, 20)
        row, column = IMAGE_SIZE / 2 + rng.uniform(-3, 3, 2)
        lean, distance = rng.uniform(-0.3, 0.3), rng.uniform(0.9, 1.1) * width
        share_HW = _placed(digits_NHW[middle], height, width, row, column, lean)
        for side in (-1, 1):
            beside = rng.integers(STARTS[split], ends[split])
            beside_row, beside_column = row + rng.uniform(-2, 2), column + side * distance
            beside_HW = _placed(digits_NHW[beside], height, width, beside_row, beside_column, lean)
            share_HW = np.maximum(share_HW, beside_HW)
        image_HWC = lit(rng, coloured(share_HW.clip(0, 1), *two_colours(rng, (0.2, 0.7))), 0.2)
        return to_pixels(rng, image_HWC, 0.06), labels[middle]

    return draw
