"""CPU kernels in C++: compiled by the machine's own compiler at first use, and kept.

One source file per family and one Python file of the same name that calls it, as in ``kernels/``. Nothing here decides
what is computed: an op has its PyTorch definition, and a function of this room gives the same bits in fewer passes
over memory. Where there is no compiler, or ``LIGHTNING_QAT_NATIVE=0`` says so, the op's PyTorch path is taken.

So a run that goes on where there is no compiler computes the same numbers, but for sums of floats, whose order is
another: the gradients of learned scales, products of converted layers, losses. They agree to what float32 sums do. The
sums of this room's own kernels do not depend on the number of threads; PyTorch promises nothing of that for its own.
"""
