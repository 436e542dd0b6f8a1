"""What several of the programs share, by subject. Nothing here is part of byol_pytorch."""

import os
import sys

# A progress bar that goes to a file is a line every 30 seconds, not ten a second.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "30")
