"""Routed LoRA: base + scaling * (dropout(x) A[i]^T) B[j]^T, in groups of output columns."""
