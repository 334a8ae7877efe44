"""The tokenizer that a GGUF file describes."""

from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prox24.errors import CheckpointError, first_line

# The cuts of a text before merges, for a byte-level vocabulary, by tokenizer.ggml.pre.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "smollm": pre_tokenizers.Digits(individual_digits=True),
    "qwen2": pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
    "llama-bpe": pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
}

MAX_TOKEN = 1024
"""The most characters of a token: the time to find its merges grows with their square."""
CONTROL_TOKEN = 3
USER_DEFINED_TOKEN = 4
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's character for a space."""


def build_tokenizer(
    metadata: dict[str, Any], context_length: int, path: Path
) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF's metadata: "gpt2" for byte-level BPE, "llama" for SentencePiece.

    The field add_bos_token of the metadata says whether a text begins with `<bos>`. Without this
    field a SentencePiece or Llama 3 text begins with it, as in llama.cpp.
    """
    try:
        return _build(metadata, context_length, path)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers has no types of exceptions
        raise CheckpointError(
            f"{path}: the tokenizer cannot be built: {first_line(error)}"
        ) from error


def _build(metadata: dict[str, Any], context_length: int, path: Path) -> PreTrainedTokenizerBase:
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and isinstance(split, str) and split in PRE_TOKENIZERS:
        tokenizer = _byte_level(metadata, split)
    elif kind == "llama":
        tokenizer = _sentence_piece(metadata)
    else:
        raise CheckpointError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {split!r} is not supported; "
            f"supported are 'llama', and 'gpt2' with {', '.join(map(repr, PRE_TOKENIZERS))}"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    whole = [
        AddedToken(token, normalized=False, special=own == CONTROL_TOKEN)
        for token, own in zip(tokens, types, strict=True)
        if own in (CONTROL_TOKEN, USER_DEFINED_TOKEN)
    ]
    tokenizer.add_special_tokens([token for token in whole if token.special])
    tokenizer.add_tokens([token for token in whole if not token.special])
    start = metadata.get("tokenizer.ggml.bos_token_id")
    is_added = kind == "llama" or split == "llama-bpe"
    if start is not None and metadata.get("tokenizer.ggml.add_bos_token", is_added):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[start]} $A", special_tokens=[(tokens[start], start)]
        )
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{field}_token_id") for name, field in named.items()}
    special = {name: tokens[place] for name, place in ids.items() if place is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _vocabulary(metadata: dict[str, Any]) -> dict[str, int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    if max(map(len, tokens)) > MAX_TOKEN:
        raise ValueError(f"a token has more than {MAX_TOKEN} characters")
    return {token: index for index, token in enumerate(tokens)}


def _byte_level(metadata: dict[str, Any], split: str) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # If a whole word is a token, Llama 3 uses this token and no merges.
    model = models.BPE(
        vocab=_vocabulary(metadata), merges=merges, ignore_merges=split == "llama-bpe"
    )
    tokenizer = Tokenizer(model)
    # "smollm" cuts only digits. The expression of GPT-2 cuts the rest.
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "smollm")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([PRE_TOKENIZERS[split], bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: dict[str, Any]) -> Tokenizer:
    """BPE with a merge for each pair of pieces that makes another piece, by falling score."""
    vocabulary = _vocabulary(metadata)
    scores = metadata["tokenizer.ggml.scores"]
    unknown = metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.unknown_token_id"]]
    ranked = [
        (-scores[index], vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece, cut)
        for piece, index in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges = [(piece[:cut], piece[cut:]) for *_, piece, cut in sorted(ranked)]
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    normal: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    decoded = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normal.insert(0, normalizers.Prepend(SPACE))
        decoded.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normal)
    tokenizer.decoder = decoders.Sequence(decoded)
    return tokenizer
