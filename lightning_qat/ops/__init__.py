"""One file per family of operations: reference, custom op, fake, autograd, CPU kernel and the checked wrapper."""
