"""Devices, processes, signals and files."""
