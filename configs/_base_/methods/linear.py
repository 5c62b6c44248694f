# Linear probe: the head alone.
method = dict(type="linear")
