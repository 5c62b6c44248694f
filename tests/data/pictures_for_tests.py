"""Image files for tests."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blots of random colours, so that no two places look alike."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The content of an image file."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """Write noise to a file, in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(*size, seed).save(path)
    return path
