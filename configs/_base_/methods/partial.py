# The last block and the final norm.
method = dict(type="partial", num_blocks=1)
