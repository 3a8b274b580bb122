"""Triton kernels, one family a file. Importing this package does not import triton.

``plans`` chooses regimes and tile sizes (plain arithmetic); ``norm``, ``gemm``, ``linear``, ``gated`` and
``symmetric`` hold the kernels and need triton; ``resources`` reads what a compiled kernel costs.
"""
