"""Slicing of masked models, and their export to other runtimes."""

from ffp_jax.export.slicing import save, slice_params

__all__ = ['save', 'slice_params']
