"""A mixture of LoRAs with its linear router: the router's logits are made beside the narrow products of the same x."""
