"""Routed adapter bottleneck: residual + act(x Wd[i]^T + bd[i]) Wu[j]^T + bu[j]."""
