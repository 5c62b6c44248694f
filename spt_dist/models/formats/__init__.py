"""Published files of weights under timm's names: one module for each format."""

from spt_dist.models.formats.source import Shape, Source, Translation
from spt_dist.models.formats.translate import translate

__all__ = ["Shape", "Source", "Translation", "translate"]
