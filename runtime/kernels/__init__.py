"""Triton kernels, one family a file. Importing this package does not import triton.

``plans`` chooses regimes and tile sizes (plain arithmetic); ``norms``, ``linear``, ``persistent``,
``gated`` and ``symmetric`` hold the kernels, ``gemm`` the product they share, and need triton;
``resources`` reads what a compiled kernel costs.
"""
