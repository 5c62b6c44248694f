"""Models: timm classifiers, pre-trained checkpoints, and the inventory of their weights."""
