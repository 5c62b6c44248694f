# Table 1: ViT-B/16 pre-trained on ImageNet-21k, which is the data sets' own backbone.
suite = dict(
    groups=dict(
        fgvc=["../fgvc/cub.py", "../fgvc/nabirds.py", "../fgvc/flowers.py", "../fgvc/dogs.py", "../fgvc/cars.py"]
    ),
    published="fgvc",
)
