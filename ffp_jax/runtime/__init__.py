"""Machines and files."""
