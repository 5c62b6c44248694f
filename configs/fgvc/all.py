# FGVC: five tasks one after another, and the paper's mean. Whatever else stands here changes all of them.
suite = dict(groups=dict(fgvc=["cub.py", "nabirds.py", "flowers.py", "dogs.py", "cars.py"]), published="fgvc")
