"""Zero-shot multiple choice: which answer a model takes to be the most likely.

    pip download --no-deps --no-binary :all: bigbench==1.0.0
    python benchmarks/multiple_choice.py bigbench-1.0.0.tar.gz MODEL [MODEL ...]

Questions are those of two tasks of BIG-bench (Apache-2.0), as the package index has them: what the
goal of a step is, and what a step to a goal is, with four answers, from wikiHow. A question and
each of its answers are one text. The answer whose text has the highest probability counts; as the
question is the same, that is the most likely answer to it. Printed is the share of right ones.
"""

import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import common
import jax
import numpy as np

import prox24
from prox24._jobs.load import Loaded

TASKS = {
    "goal": "goal_step_wikihow/goal_inference",
    "step": "goal_step_wikihow/step_inference",
}
BATCH = 8


class Question(NamedTuple):
    """Texts, one for each answer, and which is right."""

    texts: list[str]
    right: int


def read_questions(archive: Path, count: int) -> dict[str, list[Question]]:
    """The first questions of each task."""
    wanted = {f"benchmark_tasks/{folder}/task.json": name for name, folder in TASKS.items()}
    found = {}
    with tarfile.open(archive) as files:
        for member in files:
            name = wanted.get(member.name.partition("/bigbench/")[2])
            if name is not None:
                examples = json.load(files.extractfile(member))["examples"][:count]
                found[name] = [as_question(example) for example in examples]
            if len(found) == len(TASKS):
                return found
    missing = [path for path, name in wanted.items() if name not in found]
    raise SystemExit(f"{archive} has no {', '.join(missing)}")


def as_question(example: dict) -> Question:
    """Of an example of BIG-bench."""
    scores = example["target_scores"]
    texts = [f"{example['input'].rstrip()} {answer}" for answer in scores]
    return Question(texts, int(np.argmax(list(scores.values()))))


def accuracies(path: str | Path, questions: dict[str, list[Question]]) -> dict[str, float]:
    """The share of right answers in each task."""
    model = prox24.load(path)
    texts = [text for asked in questions.values() for question in asked for text in question.texts]
    losses = iter(text_losses(model, [model.tokenizer(text)["input_ids"] for text in texts]))

    def is_right(question: Question) -> bool:
        return np.argmin([next(losses) for _ in question.texts]) == question.right

    return {name: float(np.mean([*map(is_right, asked)])) for name, asked in questions.items()}


def text_losses(model: Loaded, texts: list[list[int]]) -> list[float]:
    """Summed negative log-likelihoods; texts of about the same length go together.

    Raises:
      SystemExit: one is not finite.
    """
    order = np.argsort([len(text) for text in texts], kind="stable")
    losses = np.zeros(len(texts))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        # Few lengths, since each is compiled.
        tokens = np.zeros((len(chosen), -(-len(texts[chosen[-1]]) // 8) * 8), np.int32)
        for row, index in zip(tokens, chosen, strict=True):
            row[: len(texts[index])] = texts[index]
        # Not jitted as a whole: operations compile sooner than models.
        scores = jax.nn.log_softmax(model.apply(model.params, tokens)[:, :-1])
        each = np.take_along_axis(np.asarray(scores), tokens[:, 1:, None], axis=2)[..., 0]
        for row, index in zip(each, chosen, strict=True):
            losses[index] = -row[: len(texts[index]) - 1].sum()
    if not np.isfinite(losses).all():
        raise SystemExit("the loss on a question is not finite")
    return losses.tolist()


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("archive", type=Path, help="bigbench-1.0.0.tar.gz")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--count", type=common.positive, default=250, help="of each task")
    arguments = parser.parse_args()
    questions = read_questions(arguments.archive, arguments.count)
    rows = []
    for path in arguments.models:
        found = [*accuracies(path, questions).values()]
        rows.append((str(path), *(f"{100 * share:.1f}%" for share in (*found, np.mean(found)))))
    common.show(("model", *TASKS, "mean"), rows)


if __name__ == "__main__":
    main()
