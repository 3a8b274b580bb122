"""Our C++ for CPUs, built with the compiler at hand."""

from .products import product, runs

__all__ = ["product", "runs"]
