"""Checkpoint formats: tensor names to where and how each is read."""
