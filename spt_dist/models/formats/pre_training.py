"""Why no model needs what was there to train it on masked images."""

MASKED = "stands for masked patches in pre-training"
DECODER = "decoder of the pre-training, which paints what was masked"
