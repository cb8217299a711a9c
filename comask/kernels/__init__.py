"""The custom ops' kernels, one CUDA C source each, and what compiles and launches them.

`compile` makes a cubin, PTX or a CPU library of a source, `launch` says how to launch it for given
shapes, `driver` launches on CUDA, `host` on the CPU, and `tensors` on PyTorch's tensors of either. Only
`tensors` needs more than the standard library to be imported.
"""
