"""The kernels, one CUDA C source each, and the modules that compile and launch them.

`compile` compiles a source to a cubin, PTX or a CPU library, `launch` computes the launch parameters for
given shapes, and `run` launches the kernel. All of it needs the standard library alone, except for the
functions of `run` that take PyTorch's tensors.
"""
