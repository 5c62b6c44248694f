"""Write scikit-learn's handwritten digits into the file that ``data.type="digits"`` reads.

python tools/make_digits.py --output spt_dist/assets/digits.safetensors
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as two tensors of bytes.")
    parser.add_argument("--output", type=Path, required=True)
    digits = load_digits()
    tensors = {
        "images": torch.from_numpy(digits.images).to(torch.uint8),
        "labels": torch.from_numpy(digits.target).to(torch.uint8),
    }
    save_file(tensors, parser.parse_args().output)


if __name__ == "__main__":
    main()
