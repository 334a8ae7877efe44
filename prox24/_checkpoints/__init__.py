"""Models on disk: HF folders and GGUF files in, HF folders out."""
