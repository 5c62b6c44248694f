"""Stage 1: how sensitive the task's loss is to each weight, and which weights are the most sensitive."""
