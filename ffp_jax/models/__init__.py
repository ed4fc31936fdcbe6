"""The decoder of every family, and how it decodes."""
