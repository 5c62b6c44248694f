"""From scores and a budget to a plan: which weights are tuned, and how."""
