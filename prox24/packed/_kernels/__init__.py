"""Implementations of the product with a packed weight, one in each file, and their build."""
