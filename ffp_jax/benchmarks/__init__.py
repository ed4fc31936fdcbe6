"""Measurements, printed beside the alternative; never asserted in tests."""
