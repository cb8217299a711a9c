"""Data sets: COCO files on disk, and shapes that are generated from a seed."""
