engine = dict(type="deepspeed", zero_stage=2)
