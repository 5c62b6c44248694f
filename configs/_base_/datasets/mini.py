# The mini-benchmark (docs/mini.md) in VTAB-1k's layout: 800 + 200 images train, 1,000 are held out (digits: 797).
data = dict(
    type="mini", root="data/mini", train="train800val200", val="test", transform="vtab_inception", image_size=32
)
