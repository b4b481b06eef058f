"""LoRA whose experts are weighed by gates: several experts a token, summed."""
