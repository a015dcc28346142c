"""Triton kernels, installed as esfast.kernels. They know tensors and numbers, never modules."""
