"""Calibration and quantisation (empty until INT8 arrives)."""
