"""The pruning method: importance, search, calibration, recovery."""
