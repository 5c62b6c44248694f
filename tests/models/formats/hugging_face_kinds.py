"""Models of Hugging Face's transformers with random weights, timm's of the same architecture, and files of the hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from tests.models.formats.published import randomised

VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2} | {
    "num_attention_heads": 2,
    "layer_norm_eps": 1e-6,
    "num_labels": 10,
}
WIDE: dict[str, Any] = VIT | {"intermediate_size": 96}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
SWIN = {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [2, 2, 1]} | {
    "num_heads": [1, 2, 4],
    "num_labels": 10,
}
CONVNEXT = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1], "num_labels": 10}
VIT_OF_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN_OF_TIMM = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 2, 1)} | {
    "num_heads": (1, 2, 4)
}
CONVNEXT_OF_TIMM = {"dims": (8, 12, 16, 20), "depths": (1, 2, 1, 1)}

# From the names of transformers 5's models to those of the files on the hub.
OF_VIT = {
    r"\blayers\.(\d+)\.": r"encoder.layer.\1.",
    r"\bmlp\.fc1\.": "intermediate.dense.",
    r"\bmlp\.fc2\.": "output.dense.",
}
OF_ATTENTION = {
    r"(?<=attention\.)q_proj\.": "attention.query.",
    r"(?<=attention\.)k_proj\.": "attention.key.",
    r"(?<=attention\.)v_proj\.": "attention.value.",
    r"(?<=attention\.)o_proj\.": "output.dense.",
}
OF_SWIN = {pattern: new.replace("attention.", "self.") for pattern, new in OF_ATTENTION.items()} | {
    r"\bmlp\.fc1\.": "intermediate.dense.",
    r"\bmlp\.fc2\.": "output.dense.",
    r"attention\.relative_position_bias\.": "attention.self.",
}
OF_DINOV2 = OF_ATTENTION | {r"mlp\.down_proj\.": "mlp.weights_out."}
BUFFERS = {"attention.self.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}
BUFFERS_OF_V2 = BUFFERS | {"attention.self.relative_coords_table": torch.zeros(1, 7, 7, 2)}
COMPUTED = "computed from the sizes of window and image"
MASKED = "stands for masked patches in pre-training"
PAINTS = "decoder of the pre-training, which paints what was masked"
WIDE_HEAD = "head that reads the mean of the patches beside the class token"


@dataclass(frozen=True)
class Kind:
    """A model of transformers, timm's of the same architecture, and what a file of the first holds.

    Attributes:
        theirs, config: classes of transformers.
        prefix: before the names of the backbone.
        rules: names of the installed version -> those on the hub.
        left: how names begin, or end -> why nothing needs them.
        has_head: whether the classifier is timm's.
        buffers: of each block, on the hub alone.
        shuffled: whether it computes the patches in a random order.
        tolerance: of its features; DINOv3's rotations are computed in float32.
    """

    theirs: str
    config: str
    options: dict[str, Any]
    name: str
    kwargs: dict[str, Any]
    format: str
    prefix: str = ""
    rules: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    has_head: bool = True
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    shuffled: bool = False
    tolerance: float = 1e-9


def _vit(theirs: str, config: str, options: dict[str, Any], name: str = "vit_base_patch16_224", **rest: Any) -> Kind:
    kwargs = VIT_OF_TIMM | rest.pop("kwargs", {})
    return Kind(theirs, config, options, name, kwargs, "Hugging Face's ViT", **rest)


def _dinov2(registers: bool, giant: bool) -> Kind:
    own = "Dinov2WithRegisters" if registers else "Dinov2"
    # The hidden width of SwiGLU is two thirds of 4 x 24, as a multiple of 8, twice: its gate and its values.
    kwargs = VIT_OF_TIMM | ({"mlp_ratio": 128 / 24} if giant else {})
    name = f"vit_{'giant' if giant else 'base'}_patch14_{'reg4_' if registers else ''}dinov2"
    return _vit(
        f"{own}Model",
        f"{own}Config",
        VIT | {"use_swiglu_ffn": giant},
        name,
        kwargs=kwargs,
        rules=OF_DINOV2,
        left={"embeddings.mask_token": MASKED},
        has_head=False,
    )


def _dinov3(plus: bool) -> Kind:
    """With gates, and biases of query and value, or without."""
    options = VIT | {"num_register_tokens": 4, "layer_norm_eps": 1e-5, "query_bias": plus, "value_bias": plus}
    return Kind(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        options | {"use_gated_mlp": plus, "intermediate_size": 96, "hidden_act": "silu" if plus else "gelu"},
        f"vit_small_{'plus_' if plus else ''}patch16_dinov3{'_qkvb' if plus else ''}",
        VIT_OF_TIMM,
        "Hugging Face's DINOv3",
        rules={r"^model\.": ""},
        left={"embeddings.mask_token": MASKED},
        has_head=False,
        tolerance=1e-6,
    )


def _swin(theirs: str, name: str, prefix: str, **rest: Any) -> Kind:
    is_first = prefix == "swin."
    return Kind(
        theirs,
        "SwinConfig" if is_first else "Swinv2Config",
        SWIN | {"encoder_stride": 8},
        name,
        SWIN_OF_TIMM,
        "Hugging Face's Swin",
        prefix=prefix,
        rules=OF_SWIN,
        buffers=BUFFERS if is_first else BUFFERS_OF_V2,
        **rest,
    )


def _convnext(own: str, prefix: str) -> Kind:
    theirs, config, name = f"{own}ForImageClassification", f"{own}Config", f"{prefix}_base"
    return Kind(theirs, config, CONVNEXT, name, CONVNEXT_OF_TIMM, "Hugging Face's ConvNeXt", prefix=f"{prefix}.")


KINDS = {
    "ViT": _vit("ViTForImageClassification", "ViTConfig", WIDE, prefix="vit.", rules=OF_VIT | OF_ATTENTION),
    "ViT with a pooler": _vit(
        "ViTModel",
        "ViTConfig",
        WIDE,
        rules=OF_VIT | OF_ATTENTION,
        left={"pooler.": "pooler, which timm's models have not and no head reads"},
        has_head=False,
    ),
    "DeiT": _vit(
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        WIDE,
        "deit_base_distilled_patch16_224",
        prefix="deit.",
        rules=OF_VIT | OF_ATTENTION,
    ),
    "MAE": _vit(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        WIDE | DECODER | {"decoder_intermediate_size": 24, "mask_ratio": 0.0},
        prefix="vit.",
        rules=OF_VIT | OF_ATTENTION,
        left={"decoder.": PAINTS},
        has_head=False,
        shuffled=True,
    ),
    "DINOv2": _dinov2(registers=False, giant=False),
    "DINOv2 giant": _dinov2(registers=False, giant=True),
    "DINOv2 with registers": _dinov2(registers=True, giant=False),
    "DINOv2 giant with registers": _dinov2(registers=True, giant=True),
    "DINOv2 with a classifier": _vit(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        VIT,
        "vit_base_patch14_dinov2",
        prefix="dinov2.",
        rules=OF_DINOV2,
        left={"dinov2.embeddings.mask_token": MASKED, "classifier.": WIDE_HEAD},
        has_head=False,
    ),
    "DINOv2 with registers and a classifier": _vit(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        VIT,
        "vit_base_patch14_reg4_dinov2",
        prefix="dinov2_with_registers.",
        rules=OF_DINOV2,
        left={"dinov2_with_registers.embeddings.mask_token": MASKED, "classifier.": WIDE_HEAD},
        has_head=False,
    ),
    "DINOv3": _dinov3(plus=False),
    "DINOv3 plus": _dinov3(plus=True),
    "Swin": _swin("SwinForImageClassification", "swin_tiny_patch4_window7_224", "swin."),
    "Swin of SimMIM": _swin(
        "SwinForMaskedImageModeling",
        "swin_tiny_patch4_window7_224",
        "swin.",
        left={"decoder.": PAINTS, "swin.embeddings.mask_token": MASKED},
        has_head=False,
    ),
    "Swin V2": _swin("Swinv2ForImageClassification", "swinv2_tiny_window8_256", "swinv2."),
    "ConvNeXt": _convnext("ConvNext", "convnext"),
    "ConvNeXt V2": _convnext("ConvNextV2", "convnextv2"),
}


@cache
def make_theirs(kind: str) -> Any:
    case = KINDS[kind]
    return randomised(getattr(transformers, case.theirs)(getattr(transformers, case.config)(**case.options)))


def make_timm(kind: str) -> nn.Module:
    """In float64; without a head where the file has none for it."""
    case = KINDS[kind]
    model = timm.create_model(case.name, num_classes=10 if case.has_head else 0, **case.kwargs).double().eval()
    if kind.startswith("ConvNeXt"):
        # Their last norm's epsilon is 1e-12, the paper's 1e-6.
        model.head.norm.eps = make_theirs(kind).base_model.layernorm.eps
    return model


@cache
def make_reference(kind: str) -> nn.Module:
    """For names and shapes alone."""
    return make_timm(kind)


@cache
def of_hub(kind: str) -> dict[str, Tensor]:
    """As the published files are, which earlier versions wrote."""
    case, found = KINDS[kind], {}
    state = make_theirs(kind).state_dict()
    for name, value in state.items():
        if "up_proj" in name and case.rules is OF_DINOV2:
            continue
        if "gate_proj" in name and case.rules is OF_DINOV2:
            value = torch.cat([value, state[name.replace("gate_proj", "up_proj")]])
            name = name.replace("gate_proj", "weights_in")
        for pattern, new in case.rules.items():
            name = re.sub(pattern, new, name)
        found[name] = value
        if name.endswith("layernorm_before.weight"):
            found |= {name.replace("layernorm_before.weight", each): case.buffers[each] for each in case.buffers}
    return found
