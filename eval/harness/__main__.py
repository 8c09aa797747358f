"""``python -m scout_hf.eval.harness run ...``, also under ``accelerate launch -m``."""

import sys

from scout_hf.eval.harness.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
