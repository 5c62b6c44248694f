"""Pre-trains the demo backbone on procedurally drawn images and writes it as safetensors.

Example (what made the committed asset, in some twelve minutes on one processor core):

    python tools/make_demo_backbone.py --output spt_dist/assets/demo_vit.safetensors

Shape suffixes: N images of a set, B images of a batch, C channels, H rows, W columns, K classes.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

# Must come before timm: it makes torchvision importable beside a CPU build of torch.
import spt_dist  # noqa: F401  # isort: skip

import numpy as np
import numpy.typing as npt
import safetensors.torch
import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from spt_dist.data.procedural import CLASSES, draw_images

MODEL_NAME = "vit_tiny_patch16_224"
MODEL_KWARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 2.0,
}
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
MAX_ASSET_BYTES = 4_000_000
RECIPE = (
    "tools/make_demo_backbone.py: cross-entropy on the classes of spt_dist.data.procedural, fresh images "
    "every epoch, AdamW, linear warm-up then cosine decay, label smoothing, gradient clipping"
)


def normalised(images_NHWC: npt.NDArray[np.uint8]) -> Tensor:
    """Turns uint8 (N, 32, 32, 3) images, 0 to 255, into float32 (N, 3, 32, 32), -1 to 1."""
    images_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).contiguous().float() / 255.0
    mean_C11 = torch.tensor(MEAN).view(3, 1, 1)
    std_C11 = torch.tensor(STD).view(3, 1, 1)
    return (images_NCHW - mean_C11) / std_C11


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate of a step, 0 <= step < total_steps: linear warm-up to `peak`, cosine decay to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * peak * (1.0 + math.cos(math.pi * done))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """AdamW groups: matrices decay; biases, norms, position embedding and class token do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and name not in ("pos_embed", "cls_token")
        (decayed if is_matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


@torch.no_grad()
def accuracy(model: nn.Module, num_images: int, seed: int, batch_size: int) -> float:
    """Share of `num_images` freshly drawn images that the model classifies rightly, 0 to 1."""
    model.eval()
    images_NHWC, labels_N = draw_images(num_images, seed)
    right = 0
    for start in range(0, num_images, batch_size):
        logits_BK = model(normalised(images_NHWC[start : start + batch_size]))
        labels_B = torch.from_numpy(labels_N[start : start + batch_size])
        right += int((logits_BK.argmax(dim=1) == labels_B).sum())
    model.train()
    return right / num_images


def pretrain(model: nn.Module, args: argparse.Namespace, console: Console) -> None:
    """Trains `model` in place for args.epochs epochs of args.images images, drawn anew each epoch."""
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, fused=True)
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    steps_per_epoch = args.images // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = min(total_steps // 10, 2 * steps_per_epoch)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    step = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("pre-training", total=total_steps)
        for epoch in range(args.epochs):
            # Seeds are spaced out so that no two runs or epochs share images, nor do the held-out ones.
            images_NHWC, labels_N = draw_images(args.images, epoch_seed(args.seed, epoch + 1))
            total_loss = 0.0
            for start in range(0, steps_per_epoch * args.batch_size, args.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total_steps, warmup_steps, args.lr)
                images_BCHW = normalised(images_NHWC[start : start + args.batch_size])
                labels_B = torch.from_numpy(labels_N[start : start + args.batch_size])
                loss = loss_function(model(images_BCHW), labels_B)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                total_loss += loss.item()
                step += 1
                progress.advance(task)
            mean_loss = total_loss / steps_per_epoch
            # A line per epoch as well, because the bar is invisible in a log file.
            progress.console.print(f"epoch {epoch + 1}/{args.epochs}: loss {mean_loss:.3f}")


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of the images of an epoch (1 and up); epoch 0 stands for the held-out images."""
    return seed * 100_000 + epoch


def with_sorted_metadata(data: bytes) -> bytes:
    """Sorts the metadata of a safetensors file's bytes: the library writes it in an order that varies."""
    header_end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:header_end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[header_end:]


def write_asset(model: nn.Module, heldout_accuracy: float, args: argparse.Namespace) -> int:
    """Writes the model without its head, with metadata that can rebuild it; returns the file's bytes."""
    tensors = {
        name: tensor.detach().contiguous().float()
        for name, tensor in model.state_dict().items()
        if not name.startswith("head.")
    }
    metadata = {
        "recipe": RECIPE,
        "seed": str(args.seed),
        "model_name": MODEL_NAME,
        "model_kwargs": json.dumps(MODEL_KWARGS),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "num_classes_pretraining": str(len(CLASSES)),
        "num_images_per_epoch": str(args.images),
        "num_epochs": str(args.epochs),
        "batch_size": str(args.batch_size),
        "learning_rate": str(args.lr),
        "weight_decay": str(args.weight_decay),
        "heldout_accuracy": f"{heldout_accuracy:.4f}",
        "heldout_images": str(args.heldout_images),
        "torch_version": torch.__version__,
        "timm_version": timm.__version__,
        "numpy_version": np.__version__,
    }
    data = with_sorted_metadata(safetensors.torch.save(tensors, metadata))
    if len(data) > MAX_ASSET_BYTES:
        raise ValueError(f"the asset has {len(data)} bytes, above {MAX_ASSET_BYTES}: make the model smaller")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(data)
    return len(data)


def parse_args() -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        description="Pre-train the demo backbone on procedurally drawn images (CPU, single process).",
        epilog="example: python tools/make_demo_backbone.py --output spt_dist/assets/demo_vit.safetensors",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--images", type=int, default=40_000, help="images drawn for each epoch")
    parser.add_argument("--epochs", type=int, default=16, help="epochs")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="AdamW weight decay of matrices")
    parser.add_argument("--heldout-images", type=int, default=8_000, help="images for the final accuracy")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and images, 0 or larger")
    parser.add_argument("--threads", type=int, default=1, help="processor threads; part of the determinism")
    args = parser.parse_args()
    for name in ("epochs", "batch_size", "heldout_images", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: give 1 or more")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}: give 0 or more")
    if args.images < args.batch_size:
        parser.error(f"--images is {args.images}: give at least one batch, {args.batch_size}")
    return args


def main() -> None:
    """Pre-trains, measures and writes the demo backbone."""
    args = parse_args()
    console = Console()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    model = timm.create_model(MODEL_NAME, num_classes=len(CLASSES), **MODEL_KWARGS)
    pretrain(model, args, console)
    heldout_accuracy = accuracy(model, args.heldout_images, epoch_seed(args.seed, 0), args.batch_size)
    num_bytes = write_asset(model, heldout_accuracy, args)
    console.print(f"held-out accuracy {heldout_accuracy:.4f} on {args.heldout_images} drawn images")
    console.print(f"wrote {args.output} ({num_bytes} bytes) in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
