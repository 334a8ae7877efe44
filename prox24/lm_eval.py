"""Models for lm-evaluation-harness: importing this module registers `Prox24LM` as "prox24".

Texts are padded on the right to a few lengths, so that few programs are compiled. The padding
changes no result: attention is causal, so no token attends to tokens after it.
"""

import bisect
import dataclasses
import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from prox24.errors import CalibrationError, PromptError, Prox24Error, missing_package

try:
    from jinja2 import TemplateError
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models import utils as model_utils
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

    from prox24._checkpoints.checkpoint import DTYPES, open_checkpoint, stop_tokens
    from prox24._jobs.forward import BATCH_TOKENS, all_weights, load_model, run_layer
    from prox24._jobs.tokens import begin_token, check_ids
    from prox24._models import decoder, spec
    from prox24._models.generate import advance, choose, empty_cache
except ModuleNotFoundError as error:
    missing = missing_package("prox24.lm_eval", error, "eval")
    if missing is None:
        raise
    raise missing from error

__all__ = ["Prox24LM"]

logger = logging.getLogger(__name__)

NAN = "the model's logits are NaN: a value overflows, as in float16, or the weights are damaged"

Item = TypeVar("Item")


@dataclasses.dataclass
class Continued:
    """A prompt and its continuation so far."""

    tokens: list[int]
    prompt: int  # number of tokens of the prompt
    most: int  # largest number of new tokens
    until: list[str]  # strings that end it
    draw: tuple[float, float]  # temperature and top_p
    ended: bool


@register_model("prox24")
class Prox24LM(TemplateLM):  # type: ignore[misc]
    """A model for lm-evaluation-harness, computed in float32 by JAX.

    Args:
      pretrained: an HF folder, a GGUF file, or the hub's OWNER/NAME[@REVISION].
      batch_size: number of texts of a pass; "auto" takes about 2048 tokens.
      max_length: the most tokens of a text; a longer text loses its start. None takes the model's
        positions. The memory of attention grows with the square of this length.
      dtype: of the weights in memory: "float32", "bfloat16" or "float16"; None keeps the model's.
      device: None, since JAX chooses the device. The harness passes its option --device here.

    Raises:
      CheckpointError: the model cannot be read.
      UnsupportedModelError: the model has no forward pass here.
      Prox24Error: an argument is out of its range.
    """

    def __init__(
        self,
        pretrained: str | Path,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if device is not None:
            raise Prox24Error(
                f"device {device!r}: leave it out, JAX chooses it; JAX_PLATFORMS=cpu takes the CPU"
            )
        if batch_size != "auto" and not (str(batch_size).isdecimal() and int(batch_size)):
            raise Prox24Error(f"batch_size {batch_size!r} is neither a number of texts nor 'auto'")
        if dtype is not None and dtype not in DTYPES:
            raise Prox24Error(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
        checkpoint = open_checkpoint(pretrained)
        model = load_model(checkpoint)
        positions = model.config.positions
        if max_length is not None and not 1 <= max_length <= (positions or max_length):
            raise Prox24Error(f"max_length {max_length} is not between 1 and {positions} positions")
        self.pretrained, self.batch_size, self.config = pretrained, batch_size, model.config
        self.tokenizer = checkpoint.load_tokenizer()
        self.max_length: int = (
            max_length or positions or model_utils.resolve_max_length(None, self.tokenizer)
        )
        # The padded lengths include each length at which the frequencies of a Rope change. So
        # padding never takes a text over such a length.
        self._switches = spec.switches(self.config)
        lengths = [16 << k for k in range(self.max_length.bit_length())] + self._switches
        self._lengths = sorted({n for n in lengths if n < self.max_length} | {self.max_length})
        self._stop, self._begin = stop_tokens(checkpoint), begin_token(checkpoint)
        self._draws = itertools.count()
        self._weights = all_weights(model, None if dtype is None else DTYPES[dtype])

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text, if there is one."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the start token, or else the end token."""
        if self._begin is None:
            raise PromptError(f"{self.pretrained}: the model has no token for an empty context")
        return self._begin

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in the harness's cache of requests."""
        return str(self.pretrained).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, by the tokenizer's chat template.

        Some templates refuse messages of the system. These are left out, as by the harness's own
        classes, and a warning says so.
        """
        write = functools.partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return write(chat_history)
        except TemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            logger.warning("the chat template refuses messages of the system: %s", error)
            return write(others)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text, after the tokenizer's start tokens; none is added twice."""
        if add_special_tokens is None:
            start = self.tokenizer.bos_token
            add_special_tokens = start is None or not string.startswith(start)
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        check_ids(ids, self.config.vocabulary)
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        # Requests that differ only in their last token share a pass, such as one-token choices.
        passes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise CalibrationError("a continuation has no tokens: a choice is empty")
            if len(continuation) > self.max_length:
                raise CalibrationError(
                    f"a continuation of {len(continuation)} tokens is longer than max_length, "
                    f"{self.max_length}"
                )
            text = (context or [self.prefix_token_id]) + continuation
            passes[tuple(text[-self.max_length - 1 : -1])].append(index)
        answers = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for (length,), batch in self._batches(passes, lambda text: (self._padded(len(text)),)):
                asked = [
                    (index, row, len(text))
                    for row, text in enumerate(batch)
                    for index in passes[text]
                ]
                places = [
                    (row, end - len(requests[index][2]) + i, token)
                    for index, row, end in asked
                    for i, token in enumerate(requests[index][2])
                ]
                tokens = _array(batch, self._rows(length), length)
                values, greedy = self._score(tokens, places)
                before = 0
                for index, _, _ in asked:
                    key, _, continuation = requests[index]
                    own = slice(before, before := before + len(continuation))
                    answers[index] = (float(values[own].sum()), bool(greedy[own].all()))
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[index])
                bar.update(len(asked))
        return answers

    def _score(
        self, tokens: NDArray[np.int32], places: Sequence[tuple[int, int, int]]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """log p of each token, and whether it is the most probable token.

        `places` has (row, position before the token, token).
        """
        hidden = decoder.embed_program(self.config, self._weights.outer, jnp.asarray(tokens))
        for layer, own in zip(self.config.layers, self._weights.layers, strict=True):
            hidden = run_layer(layer, own, hidden)
        padded = jnp.asarray(_array(places, 1 << (len(places) - 1).bit_length(), 3))
        found, greedy = _scores(self.config, self._weights.outer, hidden, padded)
        values = np.asarray(found, np.float64)[: len(places)]
        if np.isnan(values).any():
            raise Prox24Error(f"{self.pretrained}: {NAN}")
        return values, np.asarray(greedy)[: len(places)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts, in windows of at most `max_length` tokens."""
        windows = [
            (index, None, *make_disjoint_window(window))
            for index, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
        ]
        answers = self._loglikelihood_tokens([window[1:] for window in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (index, *_), (value, _) in zip(windows, answers, strict=True):
            totals[index] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each prompt until one of its stop strings, an end token, or its limit."""
        texts = [self._prompt(*request.args) for request in requests]
        with tqdm(total=len(requests), desc="generation", disable=disable_tqdm) as bar:
            while running := [text for text in texts if not text.ended]:
                for key, batch in self._batches(running, self._caches):
                    self._go_on(batch, *key)
                    bar.update(sum(text.ended for text in batch))
        found = []
        for request, text in zip(requests, texts, strict=True):
            own = self.tokenizer.decode(text.tokens[text.prompt :], skip_special_tokens=True)
            found.append(model_utils.postprocess_generated_text(own, text.until, None))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _prompt(self, context: str, arguments: dict[str, Any]) -> Continued:
        given = dict(model_utils.normalize_gen_kwargs(arguments))
        until = model_utils.handle_stop_sequences(given.pop("until"), self.tokenizer.eos_token)
        most, _ = given.pop("max_gen_toks"), given.pop("do_sample")
        draw = (float(given.pop("temperature", 0)), float(given.pop("top_p", 1)))
        if given.get("num_beams") == 1:  # the most probable token each time, as without it
            del given["num_beams"]
        if given:
            raise PromptError(f"prox24 does not generate with {min(given)}")
        if most >= self.max_length:
            raise PromptError(f"{most} tokens to generate leave no room in {self.max_length}")
        tokens = self.tok_encode(context)[most - self.max_length :] or [self.prefix_token_id]
        return Continued(tokens, len(tokens), most, until, draw, ended=most < 1)

    def _caches(self, text: Continued) -> tuple[Any, ...]:
        """The key of a batch: lengths of the cache and of the first pass, temperature, top_p."""
        length, last = len(text.tokens), text.prompt + text.most - 1
        capacity = next((s for s in self._switches if length <= s < last), self._padded(last))
        return (capacity, self._padded(length), *text.draw)

    def _go_on(
        self, batch: list[Continued], capacity: int, length: int, temperature: float, top_p: float
    ) -> None:
        """Continues texts until each has ended or its cache is full.

        Padding also fills cache entries after each prompt. New tokens overwrite these entries
        before any token attends to them.
        """
        rows, config = self._rows(capacity), spec.at_length(self.config, capacity)
        step = jax.vmap(functools.partial(advance, config, self._weights))
        cache = jax.tree.map(lambda x: x[:, None], empty_cache(config, rows, capacity))
        prompts = _array([text.tokens for text in batch], rows, length)
        _, cache = step(cache, prompts[:, None], np.zeros(rows, np.int32))
        while active := [
            (row, text)
            for row, text in enumerate(batch)
            if not text.ended and len(text.tokens) <= capacity
        ]:
            last = _array([text.tokens[-1:] for text in batch], rows, 1)
            starts = _array([[len(text.tokens) - 1] for text in batch], rows, 1)[:, 0]
            logits, cache = step(cache, last[:, None], starts)
            key = jax.random.fold_in(jax.random.key(0), next(self._draws))
            drawn = np.asarray(choose(logits[:, 0], key, temperature, top_p))
            for row, text in active:
                if drawn[row] < 0:
                    raise Prox24Error(f"{self.pretrained}: {NAN}")
                text.tokens.append(int(drawn[row]))
                text.ended = self._ends(text)

    def _ends(self, text: Continued) -> bool:
        own = text.tokens[text.prompt :]
        if len(own) == text.most or own[-1] in self._stop:
            return True
        written = self.tokenizer.decode(own)
        return any(end in written for end in text.until if end)

    def _padded(self, length: int) -> int:
        return self._lengths[bisect.bisect_left(self._lengths, length)]

    def _rows(self, length: int) -> int:
        return max(1, BATCH_TOKENS // length) if self.batch_size == "auto" else int(self.batch_size)

    def _batches(
        self, items: Iterable[Item], key: Callable[[Item], tuple[Any, ...]]
    ) -> Iterator[tuple[tuple[Any, ...], list[Item]]]:
        """Batches of items with one key, which begins with a length; the longest batches first."""
        groups: dict[tuple[Any, ...], list[Item]] = defaultdict(list)
        for item in items:
            groups[key(item)].append(item)
        for own in sorted(groups, reverse=True):
            rows = self._rows(own[0])
            for start in range(0, len(groups[own]), rows):
                yield own, groups[own][start : start + rows]


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    config: spec.Config, weights: dict[str, Array], hidden: Array, places: Array
) -> tuple[Array, Array]:
    """Scores of places, at most 256 at a time: one place has a logit for each vocabulary entry."""

    def some(places: Array) -> tuple[Array, Array]:
        row, position, token = places.T
        logits = decoder.logits(config, weights, hidden[row, position][None])[0]
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)
        return own[:, 0], jnp.argmax(logits, axis=-1).astype(token.dtype) == token

    found, greedy = lax.map(some, places.reshape(-1, min(len(places), 256), 3))
    return found.ravel(), greedy.ravel()


def _array(texts: Sequence[Sequence[int]], rows: int, length: int) -> NDArray[np.int32]:
    """Texts as rows of shape (rows, length), padded with zeros on the right and below."""
    padded = np.zeros((rows, length), np.int32)
    for row, text in zip(padded, texts, strict=False):
        row[: len(text)] = text
    return padded
