# VTAB-1k: 800 + 200 images train, all test images are held out. Square, bicubic, normalised as the model says.
data = dict(type="vtab", root="data/vtab-1k", train="train800val200", val="test", transform="vtab", image_size=224)
