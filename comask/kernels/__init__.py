"""The kernels, one CUDA C source each, and what compiles and launches them.

`compile` makes a cubin, PTX or a CPU library of a source, `launch` says how to launch it for given
shapes, and `run` launches it. Only what `run` does with PyTorch's tensors needs more than the standard
library.
"""
