"""Our C++ for CPUs, built with the compiler at hand."""

from .products import is_plain, product, runs

__all__ = ["is_plain", "product", "runs"]
