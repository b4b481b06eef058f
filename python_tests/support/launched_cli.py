"""`python -m adamix_kernels` that says, as it ends, whether its process group is closed."""

import atexit
import os
import runpy

import torch


def report():
    said = "open" if torch.distributed.is_initialized() else "closed"
    os.write(1, f"process group {said}\n".encode())  # in one piece: print writes its words, and two ranks print at once


if __name__ == "__main__":
    atexit.register(report)  # before the command's own: those that came later run earlier
    runpy.run_module("adamix_kernels", run_name="__main__")
