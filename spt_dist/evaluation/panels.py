"""Pictures that show an image, its ground truth and what a model makes of it side by side.

Shape suffixes: H height, W width, C colour channels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from spt_dist.data.masked_images import IGNORED
from spt_dist.data.task import Task
from spt_dist.evaluation.segmentation import HeldOut, segment_images
from spt_dist.evaluation.windows import Forward
from spt_dist.files import write_atomically
from spt_dist.sensitivity.shards import all_max

# The longer side of each of the three pictures, in pixels: smaller ones are enlarged, larger ones are reduced.
SMALLEST, LARGEST = 320, 640
FONT_SIZE, LINE, GAP, SWATCH = 14, 22, 8, 14
BACKGROUND, INK, OUTLINE, BLACK = (255, 255, 255), (20, 20, 20), (120, 120, 120), (0, 0, 0)
TITLES = ("image", "ground truth", "prediction")


def write_panels(
    forward: Forward,
    module: nn.Module,
    task: Task,
    device: torch.device,
    folder: str | Path,
    count: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> list[Path]:
    """Write panels of some held-out images, evenly spread over the set; each rank writes a share. Collective.

    Args:
        forward, module, task, device, scales, flip: as ``evaluate_miou``.
        folder: where the PNG files go, each under its image's name; made if need be.
        count: number of images; all of them where there are fewer.

    Returns:
        All files, in the order of the set, the same on every rank; they are there when this returns.

    Raises:
        UserError: as ``lay_windows``.
        OSError: a file can't be written.
    """
    held_out = cast(HeldOut, task.val)
    count = min(count, task.num_val)
    indices = [place * task.num_val // count for place in range(count)]
    paths = {index: Path(folder) / f"{held_out.label(index)}.png" for index in indices}
    for index, prediction_HW, truth_HW in segment_images(forward, module, task, device, indices, scales, flip):
        picture_HWC, truth, prediction = held_out.picture(index), truth_HW.numpy(), prediction_HW.numpy()
        _save(make_panel(picture_HWC, truth, prediction, held_out.palette, held_out.classes), paths[index])
    # Every rank's files are written once all have come here.
    all_max(0)
    return list(paths.values())


def make_panel(
    picture_HWC: NDArray[np.uint8],
    truth_HW: NDArray[np.integer],
    prediction_HW: NDArray[np.integer],
    palette: Sequence[Sequence[int]],
    classes: Sequence[str],
) -> Image.Image:
    """An image, its ground truth and a prediction side by side, above the names of the classes that occur.

    Args:
        picture_HWC: the image, RGB.
        truth_HW, prediction_HW: class of each pixel; 255, shown in black, where there is none.
        palette: ``[red, green, blue]`` of each class.
        classes: name of each class.

    Returns:
        RGB. The legend is sorted by area, the ground truth's and the prediction's together; the largest comes first.
    """
    height, width = truth_HW.shape
    size = _shown_size(width, height)
    nearest, smooth = Image.Resampling.NEAREST, Image.Resampling.LANCZOS
    colours = np.zeros((IGNORED + 1, 3), dtype=np.uint8)
    colours[: len(palette)] = palette
    # Enlarged, the image shows its pixels as the labels show theirs.
    shown = [Image.fromarray(picture_HWC).resize(size, nearest if size[0] >= width else smooth)]
    shown += [Image.fromarray(colours[labels]).resize(size, nearest) for labels in (truth_HW, prediction_HW)]
    return _draw(shown, _legend(truth_HW, prediction_HW, colours, classes))


def _save(panel: Image.Image, path: Path) -> None:
    write_atomically(path, lambda temporary: panel.save(temporary, format="png"))


def _shown_size(width: int, height: int) -> tuple[int, int]:
    """Width and height at which an image is shown; enlarged by a whole number, so that its pixels stay square."""
    longest = max(width, height)
    if longest > LARGEST:
        return max(1, round(width * LARGEST / longest)), max(1, round(height * LARGEST / longest))
    factor = -(-SMALLEST // longest)
    return width * factor, height * factor


def _legend(
    truth_HW: NDArray[np.integer],
    prediction_HW: NDArray[np.integer],
    colours: NDArray[np.uint8],
    classes: Sequence[str],
) -> list[tuple[str, tuple[int, ...]]]:
    """Name and colour of what occurs, the largest area first."""
    areas = np.bincount(np.concatenate([truth_HW.ravel(), prediction_HW.ravel()]))
    found = [int(label) for label in np.argsort(-areas, kind="stable") if areas[label]]
    return [("ignored" if label == IGNORED else classes[label], tuple(colours[label].tolist())) for label in found]


def _draw(shown: Sequence[Image.Image], legend: Sequence[tuple[str, tuple[int, ...]]]) -> Image.Image:
    """Pictures of one size in a row, each under its title, and the legend below in as many columns as fit."""
    font = ImageFont.load_default(FONT_SIZE)
    cell = SWATCH + 4 * GAP + max(round(font.getlength(text)) for text, _ in legend)
    column = max(shown[0].width, *(round(font.getlength(title)) + GAP for title in TITLES)) + GAP
    num_columns = max(1, (3 * column - GAP) // cell)
    num_rows = -(-len(legend) // num_columns)
    top = LINE + GAP + shown[0].height + GAP
    canvas = Image.new("RGB", (max(3 * column, cell) + GAP, top + num_rows * LINE + GAP), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for place, (title, picture) in enumerate(zip(TITLES, shown, strict=True)):
        left = GAP + place * column
        draw.text((left, GAP + LINE // 2), title, INK, font, anchor="lm")
        canvas.paste(picture, (left, GAP + LINE))
    for place, (text, colour) in enumerate(legend):
        row, number = divmod(place, num_columns)
        left, middle = GAP + number * cell, top + row * LINE + LINE // 2
        # The outline shows swatches that are as white as the page.
        draw.rectangle((left, middle - SWATCH // 2, left + SWATCH, middle + SWATCH // 2), colour, OUTLINE)
        draw.text((left + SWATCH + GAP, middle), text, INK, font, anchor="lm")
    return canvas
