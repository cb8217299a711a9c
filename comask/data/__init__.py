"""Data sets: COCO files on disk, and shapes made from a seed."""
