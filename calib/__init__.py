"""Calibrates and quantises bundles to int8, and searches for the layers that must stay float."""
