"""Measuring a bundle: seconds of each part, frames a second, memory, and on which machine."""
