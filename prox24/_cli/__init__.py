"""The command line."""

import os

# Only the tokenizers of transformers are used, and they work without PyTorch: its advice at import
# would worry for nothing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
