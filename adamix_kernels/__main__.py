"""`python -m adamix_kernels` is the command line `adamix`."""

from .cli import main

raise SystemExit(main())
