"""``python -m fused_lm`` is ``fused-lm``."""

import sys

from fused_lm.cli import main

sys.exit(main())
