"""Measures a bundle: seconds of each part, frames per second, memory, and the machine."""
