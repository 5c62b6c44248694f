# ADE20K's scene parsing challenge: 20,210 images train, 2,000 are held out, 150 classes.
data = dict(type="ade20k", root="data/ade/ADEChallengeData2016", crop_size=(512, 512), scale=(2048, 512), num_workers=4)
