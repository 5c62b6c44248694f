# DeepSpeed's ZeRO 3: all weights are spread over the ranks.
engine = dict(type="deepspeed", zero_stage=3)
