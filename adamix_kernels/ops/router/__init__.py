"""The gates of a linear router in one call."""
