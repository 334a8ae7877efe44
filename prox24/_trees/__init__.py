"""Any JAX model: its products, its Grams, and pruning of its parameter tree."""
