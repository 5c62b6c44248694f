"""Task files: what is in them, whatever is around the model, and files of earlier versions."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn import functional as F

from spt_dist import UserError, inject, load_delta, merge, save_delta, save_peft
from spt_dist.files import load_tensors, save_tensors
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.plans_for_tests import disturb, random_plan

IMAGES, LABELS = make_samples(3)


def make_tuned(seed: int = 3) -> nn.Module:
    model = make_vit()
    tuned = inject(model, random_plan(model, seed))
    disturb(tuned)
    return tuned


def write_version_1(tuned: nn.Module, path: Path) -> None:
    """A file as the first version wrote it: no originals, no set-up of modules, another name for them."""
    save_delta(tuned, path)
    tensors, metadata = load_tensors(path, "delta")
    metadata["version"] = metadata["plan"]["version"] = 1
    del metadata["plan"]["modules"]
    old = {name.replace(".structured.", ".low_rank."): value for name, value in tensors.items()}
    save_tensors(path, {name: value for name, value in old.items() if not name.startswith("original/")}, metadata)


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    tuned = make_tuned()
    assert tuned.spt_plan.matrices
    write_version_1(tuned, tmp_path / "old.safetensors")
    assert torch.equal(load_delta(make_vit(), tmp_path / "old.safetensors")(IMAGES), tuned(IMAGES))


def test_files_of_a_later_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    save_delta(make_tuned(), path)
    tensors, metadata = load_tensors(path, "delta")
    save_tensors(path, tensors, metadata | {"version": 3})
    with pytest.raises(UserError, match=r"task file of version 3, this spt_dist reads up to 2"):
        load_delta(make_vit(), path)


def compiled(tuned: nn.Module) -> nn.Module:
    return torch.compile(tuned, backend="eager")


def compiled_blocks(tuned: nn.Module) -> nn.Module:
    for place, block in enumerate(tuned.blocks):
        tuned.blocks[place] = torch.compile(block, backend="eager")
    return tuned


def checkpointed(tuned: nn.Module) -> nn.Module:
    apply_activation_checkpointing(tuned, check_fn=lambda module: type(module).__name__ == "Block")
    return tuned


@pytest.mark.parametrize("wrap", [compiled, compiled_blocks, checkpointed, nn.DataParallel])
def test_what_is_around_a_model_leaves_no_trace(wrap: type, tmp_path: Path) -> None:
    tuned = make_tuned()
    wanted = tuned(IMAGES)
    wrapped = wrap(tuned)
    save_delta(wrapped, tmp_path / "task.safetensors")
    loaded = load_delta(make_vit(), tmp_path / "task.safetensors")
    assert torch.equal(loaded(IMAGES), wanted)
    assert torch.allclose(merge(wrapped)(IMAGES), wanted, rtol=1e-4, atol=1e-5)


def test_what_a_file_could_not_hold_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    cases = {"blocks.1.attn.qkv.weight": "parameters outside the head are trained", "head.bias": "head.bias is frozen"}
    for name, message in cases.items():
        tuned = make_tuned()
        parameter = dict(tuned.named_parameters())[name]
        parameter.requires_grad_(not parameter.requires_grad)
        for save in (save_delta, save_peft):
            with pytest.raises(UserError, match=f"{message}.*requires_grad was changed after inject"):
                save(tuned, path)
        assert not path.exists()


def test_the_mode_of_the_backbone_is_that_of_all_modules() -> None:
    for mode in (True, False):
        model = make_vit().train(mode)
        tuned = inject(model, random_plan(model, 3, ("adapter", "lora", "prompt")))
        assert all(module.training is mode for module in tuned.modules())


def test_autocast_keeps_one_copy_of_what_several_modules_read() -> None:
    """q, k and v read the same fp32 output of the norm, cast once."""
    names = [f"blocks.0.attn.{letter}.weight" for letter in "qkv"]
    kept = []
    for chosen in (names[:1], names):
        model = make_vit()
        plan = random_plan(model, 3)
        plan.matrices, plan.vectors, plan.sparse = dict.fromkeys(chosen, "lora"), [], {}
        plan.shapes = dict.fromkeys(names, (24, 24)) | {"cls_token": (1, 1, 24)}
        tuned, sizes = inject(model, plan), set()

        def note(tensor: torch.Tensor, sizes: set[tuple[int, int]] = sizes) -> torch.Tensor:
            if tensor.dtype == torch.bfloat16 and tensor.shape[-1] == 24 and tensor.numel() == 3 * 5 * 24:
                sizes.add((tensor.untyped_storage().data_ptr(), tensor.numel()))
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        layer = tuned.get_submodule("blocks.0.attn.qkv")
        x = torch.randn(3, 5, 24, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            outputs = layer(x)
        F.mse_loss(outputs.float(), torch.zeros_like(outputs.float())).backward()
        kept.append(len(sizes))
    assert kept == [1, 1]
