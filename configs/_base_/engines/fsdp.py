# FSDP2: the frozen weights are spread over the ranks and gathered block by block.
engine = dict(type="fsdp")
