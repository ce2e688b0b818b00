"""The operators that `torch` sees, over the launchers of the kernels: a module an operator."""
