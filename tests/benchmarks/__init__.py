import sys
from pathlib import Path

# Benchmarks are scripts, which import what lies beside them.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
