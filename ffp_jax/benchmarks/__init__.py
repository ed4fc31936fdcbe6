"""Measurements of speed and memory, printed beside an alternative."""
