"""Triton kernels and their launchers, one file per family; imported only where Triton is installed.

A launcher is a function of tensors with the arguments of its op. It chooses grid and blocks from shapes alone, never
waits for the GPU, and runs on CPU tensors in Triton's interpreter. Every kernel file ends in ``TUNED``, the
configurations whose registers, spills and shared memory :mod:`lightning_qat.kernels.resources` keeps in a table.
"""
