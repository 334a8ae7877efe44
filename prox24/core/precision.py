"""The precision of every matrix product whose rounding matters."""

PRECISION = "highest"
"""Full float32 products. Accelerators' default, one bfloat16 pass or TF32, has errors of 1e-3: too
much for Grams, for quadratic losses, and for activations that are compared with others'."""
