"""Implementations of the product with a packed weight, one a file, and what builds them."""
