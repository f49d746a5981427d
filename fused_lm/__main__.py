"""``python -m fused_lm``: the same as ``fused-lm``, and what ``torchrun`` starts."""

import os
import sys

from fused_lm.cli import main

code = main()
if "RANK" in os.environ:
    # A thread of gloo that lets go of a tensor while Python is torn down aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
