"""The main job, start to end: `python -m adamix_kernels.demo` (what `make demo` runs)."""
