"""`python scripts/train.py --config X` is `hjepa train --config X`."""

import sys

from hjepa.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
