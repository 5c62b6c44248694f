"""What CLIP has beside the vision tower: one for text, and what maps features to the space that both share.

The latter is a head, where the model's has its shape.
"""

import re
from collections.abc import Mapping

from spt_dist.models.formats.rearrange import transposed, zeros
from spt_dist.models.formats.source import Draft, Shape

TEXT_TOWER = "text tower of CLIP"
# As OpenAI names it, and open_clip.
_OF_TEXT = re.compile(
    r"(token_embedding|transformer|ln_final|text|text_decoder|text_projection)\..+"
    r"|positional_embedding|text_projection|logit_scale|logit_bias|attn_mask"
    r"|input_resolution|context_length|vocab_size"
)
_HEADS = ("head.fc.", "head.")


def leave_text_tower(draft: Draft) -> None:
    """Leave what has the names of the text's tower in a file of open_clip."""
    for name in draft.shapes:
        if _OF_TEXT.fullmatch(name):
            draft.leave(name, TEXT_TOWER)


def take_projection(draft: Draft, name: str, wanted: Mapping[str, Shape], is_transposed: bool = False) -> None:
    """Take the matrix ``name`` for the head if it is as large, otherwise leave it.

    Args:
        draft: that has it.
        name: ``(outputs, width)``, or ``(width, outputs)`` if ``is_transposed``. The file has no bias beside it.
        wanted: names and shapes of the model's tensors.
        is_transposed: see ``name``.
    """
    shape = draft.shapes[name][::-1] if is_transposed else draft.shapes[name]
    head = next((each for each in _HEADS if wanted.get(each + "weight") == shape), None)
    if head is None:
        draft.leave(name, "projection to the space that text shares")
        return
    if is_transposed:
        draft.make(head + "weight", [name], shape, transposed, "transposed")
    else:
        draft.take(head + "weight", name)
    if head + "bias" in wanted:
        draft.make(head + "bias", [], shape[:1], zeros(shape[:1]), "zeros: the file has no bias")
