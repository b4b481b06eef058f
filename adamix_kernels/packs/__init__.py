"""Packs: several adaptations, trained apart, in one model, addressed by name."""
