"""Show what is in a file of weights, and what a model takes from it; write the weights of a ViT, or of a segmentor with
one, under timm's names or under mmsegmentation's, or those of any model as the model takes them."""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from _cli import ConfigOptions, describe, make_parser, run
from spt_dist import UserError
from spt_dist.models.accounts import Account
from spt_dist.models.checkpoints import WeightsFile
from spt_dist.models.classifier import create_model
from spt_dist.models.mmseg_names import MMSEG, TIMM, check_whole, naming_of, to_mmseg, to_timm
from spt_dist.models.weight_files import open_weights, write_weights

EXAMPLE = """\
python launch/convert.py checkpoints/ViT-B_16.npz
  python launch/convert.py checkpoints/ViT-B_16.npz --model vit_base_patch16_224 --kwargs img_size=384
  python launch/convert.py checkpoints/ViT-B_16.npz vit_b16.safetensors --model vit_base_patch16_224
  python launch/convert.py vit_large_patch16_384.safetensors pretrain/vit_large_p16.pth --to mmseg"""


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "source",
        metavar="IN",
        type=Path,
        help="the weights: .safetensors, .pth, .pt, .bin, .npz, or .index.json",
    )
    parser.add_argument(
        "target", metavar="OUT", nargs="?", type=Path, help="where they go, in the suffix's format; else they are shown"
    )
    parser.add_argument("--to", choices=(TIMM, MMSEG), help="whose names; those that IN does not have, if not given")
    parser.add_argument("--model", metavar="NAME", help="timm's name of a model that is to take them")
    parser.add_argument(
        "--kwargs", nargs="+", action=ConfigOptions, default={}, metavar="KEY=VALUE", help="model.kwargs of a config"
    )
    parser.add_argument("--num-classes", type=int, default=0, metavar="N", help="outputs of the model's head; 0: none")
    parser.add_argument("--keep-head", action="store_true", help="take the head from IN too")
    arguments = parser.parse_args()
    if arguments.model is None:
        _refuse_options_of_models(arguments)
    if arguments.to is not None and (arguments.model is not None or arguments.target is None):
        raise UserError(f"--to {arguments.to}: is for writing OUT under the names of a plain ViT, without --model")
    if arguments.keep_head and not arguments.num_classes:
        raise UserError("--keep-head: needs --num-classes, the classes that the head in IN has")
    if arguments.model is None and arguments.target is not None:
        _rename(arguments.source, arguments.target, arguments.to)
        return
    weights = WeightsFile(str(arguments.source))
    print(_look_at(weights, arguments).table())
    if arguments.target is not None:
        state: dict[str, Tensor] = {name: weights.read(name) for name in weights.taken()}
        describe({"weights": write_weights(arguments.target, state), "tensors": len(state)})


def _refuse_options_of_models(arguments: Namespace) -> None:
    for option in ("--kwargs", "--num-classes", "--keep-head"):
        if getattr(arguments, option.strip("-").replace("-", "_")):
            raise UserError(f"{option}: says how a model takes IN; give its name with --model, or leave {option} out")


def _look_at(weights: WeightsFile, arguments: Namespace) -> Account:
    if arguments.model is None:
        return weights.survey()
    model = create_model(arguments.model, arguments.num_classes, arguments.kwargs, torch.device("meta"))
    return weights.check(model, arguments.keep_head)


def _rename(source: Path, target: Path, to: str | None) -> None:
    """Write a plain ViT under timm's names or mmseg's."""
    weights = open_weights(source)
    state = {name: weights.read(name) for name in weights.names()}
    naming = naming_of(state)
    if naming is None:
        raise UserError(
            f"{source}: no plain ViT under timm's or mmseg's names; first: {sorted(state)[:1]}; other weights are "
            "written for a --model"
        )
    under_timm = to_timm(state) if naming == MMSEG else state
    check_whole(under_timm)
    wanted = to or (MMSEG if naming == TIMM else TIMM)
    if wanted != naming:
        state = to_mmseg(state) if wanted == MMSEG else under_timm
    path = write_weights(target, state)
    describe({"weights": path, "names": f"{wanted} (were {naming})", "tensors": len(state)})


if __name__ == "__main__":
    run(main)
