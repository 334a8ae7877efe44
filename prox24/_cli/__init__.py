"""The command line."""

import os

# Only the tokenizers of transformers are used, and they work without PyTorch. So its advice to
# install PyTorch is hidden.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
