"""The decoder of every family, its parameters, and decoding."""
