"""Fine-tune a model: ``python train.py --config configs/NAME.yaml [--section.key VALUE ...]``."""

import sys

from smoa_jax.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
