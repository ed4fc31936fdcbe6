"""The method: what to remove, and how to repair the rest."""
