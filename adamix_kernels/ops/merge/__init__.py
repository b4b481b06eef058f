"""Merging: the weighted mean of a bank, and LoRA factors folded into a weight."""
