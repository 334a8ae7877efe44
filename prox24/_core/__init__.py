"""Mathematics on arrays: patterns, the penalty and its proximal operator."""
