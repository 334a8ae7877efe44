"""The perplexity of a model on a text."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prox24._jobs import torchax
from prox24._jobs.output import Report, table
from prox24._jobs.perplexity import native_perplexity
from prox24._jobs.progress import progress_bar
from prox24._jobs.text import NOVEL, Text, Windows, evaluation_windows
from prox24.errors import CalibrationError


@dataclasses.dataclass(frozen=True)
class PerplexityReport(Report):
    """exp of the mean negative log-likelihood; printed, it is a table.

    Attributes:
      model: the model.
      text: the name of the text.
      perplexity: per predicted token.
      context_length: tokens of a window. The first token is given, and the others are predicted.
      windows: the number of windows.
      predicted_tokens: windows (context_length - 1).
    """

    model: str
    text: str
    perplexity: float
    context_length: int
    windows: int
    predicted_tokens: int

    def __str__(self) -> str:
        rows = [
            ["perplexity", f"{self.perplexity:.3f}"],
            ["text", self.text],
            ["context length", f"{self.context_length} tokens"],
            ["windows", str(self.windows)],
            ["predicted tokens", str(self.predicted_tokens)],
        ]
        return table(["model", self.model], rows)


def perplexities(
    models: Sequence[str], texts: Sequence[Text], quiet: bool
) -> list[list[PerplexityReport]]:
    """The perplexity of each model on each text.

    All models are opened and all texts read first, since a late error would lose the figures.
    """
    for file in {file for text in texts for file in text.files} if len(models) > 1 else ():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise CalibrationError(f"{file} can be read once, for one model: give a file instead")
    windows = {}
    for model in models:
        checkpoint = torchax.open_any(model)
        windows[model] = [evaluation_windows(checkpoint, text) for text in texts]

    def one(model: str, text: Text, own: NDArray[np.int32]) -> PerplexityReport:
        report = perplexity(model, own, quiet=quiet)
        return dataclasses.replace(report, text=text.called(NOVEL))

    return [
        [one(model, text, own) for text, own in zip(texts, windows[model], strict=True)]
        for model in models
    ]


def perplexity(
    model: str | Path, text: Windows = Text(), *, quiet: bool = True
) -> PerplexityReport:
    """exp(-mean log p(token t | tokens 0..t-1 of its window)), on windows that do not overlap.

    It is computed in float32, with one layer's weights in memory. A model that runs by torchax is
    in memory as a whole. The losses of windows are added in float64.

    Args:
      model: an HF folder, a GGUF file, or the hub's OWNER/NAME[@REVISION].
      text: a text, whose first windows are used, by default a novel of the package. Or token ids,
        shape (windows, length).
      quiet: shows no progress bar.

    Returns:
      A `PerplexityReport`.

    Raises:
      CheckpointError: the model cannot be read.
      CalibrationError: the text is too short, or the loss is not finite.
      UnsupportedModelError: the model has no forward pass here, and torchax cannot run it.
    """
    checkpoint = torchax.open_any(model)
    windows = evaluation_windows(checkpoint, text)
    step, steps, measure = "window", len(windows), torchax.torch_perplexity
    if checkpoint.decoder is not None:
        step, steps, measure = "layer", len(checkpoint.decoder.layers), native_perplexity
    with progress_bar(f"eval {Path(model).name}", steps, quiet) as advance:
        found = measure(checkpoint, windows, lambda index: advance(f"{step} {index}", None))
    name = text.called(NOVEL) if isinstance(text, Text) else "tokens"
    predicted = windows.size - len(windows)
    return PerplexityReport(str(model), name, found, windows.shape[1], len(windows), predicted)
