"""Data: tasks (training and held-out samples with labels), and how they are dealt out to ranks."""
