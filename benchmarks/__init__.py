"""Measurements. Each module prints its table when it is run."""
