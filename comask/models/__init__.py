"""The network of the paper, one concept a file: start at `comask.models.comask`."""
