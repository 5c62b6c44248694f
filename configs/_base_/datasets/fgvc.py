# FGVC with VPT's lists, crops and flips. transform="fgvc_spt" is SPT's code, "fgvc_paper" what both papers write.
data = dict(type="fgvc", root="data/fgvc", train="train", val="test", transform="fgvc", image_size=224, num_workers=4)
