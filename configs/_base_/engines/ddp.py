engine = dict(type="ddp")
