"""Whole models: configuration, injection, training, checkpoints."""
