"""Write the weights of a ViT, or of a segmentor with one, under timm's names or under mmsegmentation's."""

from pathlib import Path

from _cli import describe, make_parser, run
from spt_dist import UserError
from spt_dist.models.mmseg_names import MMSEG, TIMM, check_whole, naming_of, to_mmseg, to_timm
from spt_dist.models.weight_files import open_weights, write_weights

EXAMPLE = "python launch/convert.py vit_large_patch16_384.safetensors pretrain/vit_large_p16.pth --to mmseg"


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("source", metavar="IN", type=Path, help="the weights: .safetensors, .pth, .pt or .bin")
    parser.add_argument("target", metavar="OUT", type=Path, help="where they go, in the format of the suffix")
    parser.add_argument("--to", choices=(TIMM, MMSEG), help="whose names; those that IN does not have, if not given")
    arguments = parser.parse_args()
    weights = open_weights(arguments.source)
    state = {name: weights.read(name) for name in weights.names()}
    naming = naming_of(state)
    if naming is None:
        raise UserError(f"{arguments.source}: no plain ViT under timm's or mmseg's names; first: {sorted(state)[:1]}")
    under_timm = to_timm(state) if naming == MMSEG else state
    check_whole(under_timm)
    wanted = arguments.to or (MMSEG if naming == TIMM else TIMM)
    if wanted != naming:
        state = to_mmseg(state) if wanted == MMSEG else under_timm
    path = write_weights(arguments.target, state)
    describe({"weights": path, "names": f"{wanted} (were {naming})", "tensors": len(state)})


if __name__ == "__main__":
    run(main)
