"""Models on disk, in every format."""
