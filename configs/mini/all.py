# The mini-benchmark: eight tasks one after another, and one table. Whatever else stands here changes all of them.
suite = dict(
    groups=dict(
        natural=["digits.py", "photos.py"],
        specialized=["textures.py", "grades.py"],
        structured=["solids_count.py", "solids_dist.py", "sprites_loc.py", "sprites_ori.py"],
    ),
)
