"""Calibration, int8 quantisation, and the search for what must stay float."""
