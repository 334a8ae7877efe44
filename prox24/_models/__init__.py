"""Forward passes of model families, as pure functions on dicts of arrays."""
