"""The layer-wise problem and the solvers for it."""
