"""Models on disk: finding, reading and writing them in every format."""
