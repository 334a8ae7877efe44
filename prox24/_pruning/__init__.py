"""How a model is pruned, layer after layer: the recipe, what runs a model, and the one loop."""
