"""Draws the picture of docs/mini.md: test images of each task of the mini-benchmark, a column for each of some classes.

Example:

    python launch/prepare_data.py mini --make data/mini
    python tools/draw_mini_sheet.py data/mini docs/images/mini.png
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from spt_dist.data.lists.vtab import read_vtab_list
from spt_dist.data.mini.canvas import IMAGE_SIZE
from spt_dist.data.mini.tasks import MINI_TASKS

COLUMNS, ROWS = 10, 2
CELL, ZOOM, LABEL, BETWEEN = 2 * IMAGE_SIZE + 2, 2, 18, 14


def strip(root: Path, task: str) -> Image.Image:
    """The task's name, and two images each of up to ten of its classes, spread evenly over all of them."""
    known = MINI_TASKS[task]
    listed = read_vtab_list(root / task, "test", known.num_classes)
    columns = min(COLUMNS, known.num_classes)
    classes = [round(column * (known.num_classes - 1) / (columns - 1)) for column in range(columns)]
    sheet = Image.new("RGB", (COLUMNS * CELL, LABEL + ROWS * CELL), "white")
    title = f"{task} ({known.group}, {known.num_classes} classes)"
    ImageDraw.Draw(sheet).text((0, 0), title, fill="black", font=ImageFont.load_default(13))
    for column, wanted in enumerate(classes):
        files = [file for file, label in zip(listed.files, listed.labels, strict=True) if label == wanted]
        for row, file in enumerate(files[:ROWS]):
            with Image.open(root / task / file) as image:
                enlarged = image.resize((ZOOM * IMAGE_SIZE, ZOOM * IMAGE_SIZE), Image.Resampling.NEAREST)
            # Noise in the last bits is half of the file.
            enlarged = ImageOps.posterize(enlarged, 5)
            sheet.paste(enlarged, (column * CELL, LABEL + row * CELL))
    return sheet


def main() -> None:
    """Draws all tasks, two beside each other."""
    parser = argparse.ArgumentParser(description="Draw test images of each task of the mini-benchmark.")
    parser.add_argument("root", type=Path, help="the folder that `launch/prepare_data.py mini --make` made")
    parser.add_argument("output", type=Path, help="the PNG file to write")
    args = parser.parse_args()
    strips = [strip(args.root, task) for task in MINI_TASKS]
    width, height = strips[0].width, strips[0].height + BETWEEN
    sheet = Image.new("RGB", (2 * width + BETWEEN, (len(strips) + 1) // 2 * height), "white")
    for number, image in enumerate(strips):
        sheet.paste(image, (number % 2 * (width + BETWEEN), number // 2 * height))
    sheet.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
