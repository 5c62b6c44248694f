"""Process groups under any launcher, engines, and checkpoints."""
