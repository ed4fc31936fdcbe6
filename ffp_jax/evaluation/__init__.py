"""Losses, perplexity protocols and benchmark tasks."""
