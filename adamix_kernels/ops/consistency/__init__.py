"""Losses of two passes: cross-entropy on the first, symmetric KL between both."""
