"""Exports checkpoints to bundles, and builds engines."""
