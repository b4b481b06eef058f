"""`python -m adamix_kernels.demo`."""

from .run import main

raise SystemExit(main())
