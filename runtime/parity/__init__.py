"""Measures whether all backends of a bundle are still the trained model, for `comask eval`."""
