"""`python -m adamix_kernels.demo`."""

import sys

from .._extras import explained

try:
    from .run import main

    status = main()
except ModuleNotFoundError as error:
    told = explained(error, what="the demo", at_least="demo")
    if told is error:
        raise
    print(f"adamix_kernels.demo: {told}", file=sys.stderr)
    status = 2
raise SystemExit(status)
