"""`prox24 generate`: continues prompts by models."""

import argparse
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prox24._cli import options

if TYPE_CHECKING:
    from prox24._checkpoints.checkpoint import Checkpoint


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.epilog = 'Example: prox24 generate MODEL PRUNED --prompt "Once upon a time"'
    command.add_argument("models", nargs="+", metavar="MODEL", help=options.MODEL)
    command.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="the text to continue; may be given several times",
    )
    command.add_argument(
        "--tokens", type=options.positive, default=64, help="most tokens to generate (default: 64)"
    )
    command.add_argument(
        "--temperature",
        type=options.nonnegative,
        default=0.0,
        help="0 takes the most probable tokens (default: 0)",
    )
    command.add_argument(
        "--top-p",
        type=options.probability,
        default=1.0,
        metavar="P",
        help="draw from the most probable tokens that have this probability together (default: 1)",
    )
    command.add_argument(
        "--seed", type=options.index, default=0, help="of the random draws (default: 0)"
    )
    command.add_argument(
        "--dtype", choices=options.DTYPES, help="of the weights in memory (default: the model's)"
    )
    command.add_argument(
        "--packed", action="store_true", help="keep the linears of a 2:4 model packed in memory"
    )
    options.add_output(command, quiet="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    from prox24._checkpoints.checkpoint import open_checkpoint
    from prox24._jobs.forward import load_model
    from prox24._jobs.output import print_json
    from prox24._jobs.text import prompt_tokens
    from prox24._models.generate import check_prompts

    # All models are opened and all prompts checked first: most errors come before the first text.
    opened = []
    for name in arguments.models:
        checkpoint = open_checkpoint(name)
        prompts = [prompt_tokens(checkpoint, prompt) for prompt in arguments.prompt]
        for prompt in prompts:
            check_prompts(load_model(checkpoint).config, prompt, arguments.tokens)
        opened.append((name, checkpoint, prompts))
    single = len(arguments.models) == len(arguments.prompt) == 1
    # One model at a time is in memory. The texts of the last one are printed at once.
    *before, last = [_continuations(*each, arguments) for each in opened]
    rows = []
    for of_prompt in zip(*map(list, before), last, strict=True):
        for row in of_prompt:
            rows.append(row)
            if not arguments.json:
                title = "" if single else f"--- {row['model']}\n"
                print(f"{title}{row['prompt']}{row['text']}", flush=True)
    if arguments.json:
        print_json(rows[0] if single else {"rows": rows})
    return 0


def _continuations(
    name: str, checkpoint: "Checkpoint", prompts: list[Any], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A model's continuation of each prompt, with its figures."""
    from prox24._checkpoints.checkpoint import DTYPES, stop_tokens
    from prox24._jobs.forward import all_weights, load_model
    from prox24._jobs.output import peak_memory_bytes
    from prox24._jobs.progress import progress_bar
    from prox24._models.generate import generate
    from prox24.packed import pack

    model, tokenizer = load_model(checkpoint), checkpoint.load_tokenizer()
    stop = stop_tokens(checkpoint)
    pack_linear = pack if arguments.packed else None
    weights = all_weights(model, DTYPES.get(arguments.dtype), pack_linear=pack_linear)

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    for given, prompt in zip(arguments.prompt, prompts, strict=True):
        tokens: list[int] = []
        times = [time.perf_counter()]
        with progress_bar("generate", arguments.tokens, arguments.quiet, log=False) as advance:
            for (token,) in generate(
                model.config,
                weights,
                prompt,
                arguments.tokens,
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                seed=arguments.seed,
                stop=stop,
            ):
                tokens.append(int(token))
                times.append(time.perf_counter())
                advance("", None)
        # Some tokenizers drop the space before a first word, so the prompt is decoded too.
        before = prompt[0].tolist()
        yield {
            "model": str(name),
            "prompt": given,
            "prompt_tokens": prompt.size,
            "tokens": tokens,
            "text": decode(before + tokens).removeprefix(decode(before)),
            "seconds": times[-1] - times[0],
            "tokens_per_second": decoding_rate(times),
            "peak_memory_bytes": peak_memory_bytes(),
        }


def decoding_rate(times: list[float]) -> float | None:
    """Tokens a second, of the times in seconds at the start and after each token.

    The prompt makes the first token, and the second one's programs are compiled; what remains
    counts. None if nothing does.
    """
    decoded = times[2:]
    return (len(decoded) - 1) / (decoded[-1] - decoded[0]) if len(decoded) > 1 else None
