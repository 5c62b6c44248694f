"""Stage 2: the training loop, and the whole run from a config."""
