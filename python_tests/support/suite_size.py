"""The suite's two sizes: that of `make test`, and `make nightly`, which repeats more of the same (ADAMIX_NIGHTLY=1)."""

import os

NIGHTLY = os.environ.get("ADAMIX_NIGHTLY") == "1"
