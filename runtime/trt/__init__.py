"""TensorRT and TensorRT-RTX, by one body of code over whichever module is installed."""
