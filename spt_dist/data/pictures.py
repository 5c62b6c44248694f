"""From the content of an image file to what a classifier takes.

Shape suffixes: B images, C channels (red, green, blue), H rows, W columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from spt_dist.data.samples import BadSampleError, Item, RawSample
from spt_dist.data.transforms import named_transform
from spt_dist.errors import UserError
from spt_dist.normalisation import read_normalisation

MAX_PIXELS: Final = 2**26
"""Most pixels of an image, 8,192 x 8,192, before and after it is resized: some kilobytes can stand for gigabytes."""

# Pillow knows many more, and starts other programs for some of them.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def decode(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image as the published readers do: to RGB, whatever it was, transparency dropped, and not turned.

    Of 16 bits a pixel the upper 8 are kept, where Pillow would make nearly all of it white.

    Args:
        content: of the file.
        name: of the sample, for the error.
        max_pixels: most pixels it may have.

    Returns:
        an RGB image, in memory as a whole.

    Raises:
        BadSampleError: it is no image of a known format, is cut off or damaged, or has too many pixels.
    """
    if not content:
        raise BadSampleError(f"{name}: is empty")
    try:
        image: Image.Image = Image.open(BytesIO(content), formats=_FORMATS)
        # Only the header is read so far.
        if image.width * image.height > max_pixels:
            raise BadSampleError(f"{name}: has {image.width} x {image.height} pixels; at most {max_pixels:,} are read")
        image.load()
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise BadSampleError(f"{name}: has 32 bits a pixel; save it with 8")
        if image.mode == "P":
            # It is dropped in any case, but Pillow warns of that for each image.
            image.info.pop("transparency", None)
        return image if image.mode == "RGB" else image.convert("RGB")
    except BadSampleError:
        raise
    except UnidentifiedImageError as error:
        raise BadSampleError(f"{name}: is no image ({', '.join(_FORMATS)} can be read)") from error
    # A decoder that meets a damaged file raises nearly anything.
    except Exception as error:
        raise BadSampleError(f"{name}: can't be decoded ({str(error) or type(error).__name__})") from error


class PicturePreparation:
    """How an image file becomes an input of a classifier: one of ``transforms.TRANSFORMS``.

    Random numbers are torch's own, from the CPU, seeded for each image anew and put back behind it; so only one thread
    of a process may prepare images at random.

    Args:
        transform: its name.
        image_size: edge of the square that the model takes, in pixels.
        on_device: cut and resize where the model is. Workers then only decode. Crops and flips stay the same, but torch
            rounds otherwise than Pillow: in tests single grey levels differ by 2 at most where Pillow resized.
        normalize: in place of the transform's normalisation, see ``normalisation.read_normalisation``.

    Attributes:
        is_random: whether training images are seen differently in each epoch.
        on_device: as given.

    Raises:
        UserError: there is no such transform or normalisation, or ``image_size`` is below 1.
    """

    def __init__(
        self,
        transform: str,
        image_size: int,
        on_device: bool = False,
        normalize: str | Mapping[str, Any] | None = None,
    ) -> None:
        if image_size < 1:
            raise UserError(f"config: data.image_size={image_size} has to be at least 1")
        named = named_transform(transform)
        self.is_random: Final = named.train is not None
        self.on_device: Final = on_device
        self._held_out = named.held_out(image_size)
        self._train = self._held_out if named.train is None else named.train(image_size)
        self._image_size = image_size
        self._normalisation = (
            named.normalisation if normalize is None else read_normalisation("data.normalize", normalize)
        )

    def prepare(self, sample: RawSample, epoch: int | None, index: int) -> Item:
        """What a worker does; see ``samples.Preparation``.

        Returns:
            the image in grey levels from 0 to 255, and the sample's target. The image is ``(3, image_size,
            image_size)``, uint8, or fp32 where the transform does not round; with ``on_device`` uint8 ``(3, H, W)`` of
            its own size.

        Raises:
            BadSampleError: it can't be decoded, or is too large or too narrow.
        """
        return self.prepare_picture(decode(sample.image, sample.name), sample.name, epoch, index), sample.target

    def prepare_picture(self, picture: Image.Image, name: str, epoch: int | None, index: int) -> Tensor:
        """``prepare`` for an RGB image that is decoded already.

        Raises:
            BadSampleError: it is too narrow.
        """
        self._check_shape(picture, name)
        cut = picture if self.on_device else self._cut(picture, epoch, index)
        image_CHW: Tensor = cut if isinstance(cut, Tensor) else pil_to_tensor(cut)
        return image_CHW.contiguous()

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        """Images as the model takes them; see ``samples.Preparation``.

        Args:
            inputs: from ``prepare``, on any one device.
            epoch, indices: as ``prepare`` had them.

        Returns:
            fp32 ``(B, 3, image_size, image_size)``, equal to the last bit to torchvision's ToTensor and Normalize.
        """
        if self.on_device:
            inputs = [self._cut(image_CHW, epoch, index) for image_CHW, index in zip(inputs, indices, strict=True)]
        images_BCHW = torch.stack(list(inputs)).float()
        # A GPU multiplies by the reciprocal of a number, but divides by a tensor. Not blocking: nothing waits for it.
        white, mean_C11, std_C11 = (
            torch.tensor(values).view(-1, 1, 1).to(images_BCHW.device, non_blocking=True)
            for values in ((255.0,), self._normalisation.mean, self._normalisation.std)
        )
        return images_BCHW.div_(white).sub_(mean_C11).div_(std_C11)

    def blank(self) -> Item:
        """A black image of class 0."""
        edges = self._image_size, self._image_size
        return self.prepare_picture(Image.new("RGB", edges), "blank", None, 0), 0

    def _cut(self, image: Any, epoch: int | None, index: int) -> Any:
        if epoch is None or not self.is_random:
            return self._held_out(image)
        with _random_state(epoch, index):
            return self._train(image)

    def _check_shape(self, picture: Image.Image, name: str) -> None:
        """An image of 1 x 60,000 pixels would be enlarged to 256 x 15 million."""
        shorter, longer = sorted(picture.size)
        if longer * (self._image_size * 8 // 7) ** 2 > MAX_PIXELS * shorter:
            raise BadSampleError(
                f"{name}: has {picture.width} x {picture.height} pixels, too narrow for data.image_size="
                f"{self._image_size}"
            )


@contextmanager
def _random_state(*key: int) -> Iterator[None]:
    """For the length of the block torch's random numbers on the CPU follow from ``key`` alone."""
    state = torch.get_rng_state()
    # torch.manual_seed would seed the GPUs as well.
    torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
    try:
        yield
    finally:
        torch.set_rng_state(state)
