# VTAB-1k: 19 tasks one after another, and the paper's table. Whatever else stands here changes all of them:
#   method = dict(type="lora", rank=16, targets=["q", "v"])
suite = dict(
    groups=dict(
        natural=[
            "cifar.py",
            "caltech101.py",
            "dtd.py",
            "oxford_flowers102.py",
            "oxford_iiit_pet.py",
            "svhn.py",
            "sun397.py",
        ],
        specialized=["patch_camelyon.py", "eurosat.py", "resisc45.py", "diabetic_retinopathy.py"],
        structured=[
            "clevr_count.py",
            "clevr_dist.py",
            "dmlab.py",
            "kitti.py",
            "dsprites_loc.py",
            "dsprites_ori.py",
            "smallnorb_azi.py",
            "smallnorb_ele.py",
        ],
    ),
    published="vtab",
)
