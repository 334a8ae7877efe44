"""The `prox24` command: arguments, and errors as one line with exit code 2."""

import argparse
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax

from prox24.checkpoints.checkpoint import DTYPES
from prox24.checkpoints.writer import OUTPUTS
from prox24.cli import (
    convert,
    demo,
    distill,
    evaluate,
    generate,
    inspect_model,
    plan,
    prune,
    verify,
)
from prox24.core.pattern import Pattern, Unstructured, as_pattern
from prox24.core.precision import COMPUTE_DTYPES
from prox24.errors import Prox24Error, first_line
from prox24.processes import is_missing_device, leave
from prox24.solvers.solve import REFITS, SOLVERS

MODEL = "HF folder, GGUF file, or the hub's OWNER/NAME[@REVISION]"
M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs one command.

    Returns:
      0, or 1 where `verify` finds a tensor that is not as it should be; or, with one line on
      standard error, 2 on an error, or 128 and the number of the signal that ended it, SIGINT or
      SIGTERM. Where the reader of what is printed has ended it is that of SIGPIPE, without a line.
    """
    parsed = parser().parse_args(arguments)
    _give_back_memory()
    try:
        with _ended_by(signal.SIGTERM):
            code = int(parsed.run(parsed))
            sys.stdout.flush()
            return code
    except Prox24Error as error:
        return _end(f"error: {error}", error, 2)
    except jax.errors.JaxRuntimeError as error:
        return _end(f"error: a device fails: {first_line(error)}", error, 2)
    except RuntimeError as error:
        if not is_missing_device(error):
            raise
        return _end(f"error: {first_line(error)}", error, 2)
    except BrokenPipeError:  # whoever read what was printed has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _end(f"error: {error}", error, 2)
    except MemoryError as error:
        return _end(f"error: out of memory: {error}", error, 2)
    except UnicodeError as error:  # of a name or an argument that is not UTF-8
        return _end(f"error: text that is no Unicode: {error}", error, 2)
    except Terminated as error:
        return _end("ended by SIGTERM", error, 128 + signal.SIGTERM)
    except KeyboardInterrupt as error:
        return _end("interrupted", error, 128 + signal.SIGINT)


def _give_back_memory() -> None:
    """Has glibc, where it is, give back what is freed of 1 MiB or more.

    By itself it comes to keep pieces of up to 32 MB that often do not fit the next array, and the
    peak of memory then depends on the sizes that went before.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def _ended_by(number: signal.Signals) -> Iterator[None]:
    """Has a signal end the block as Ctrl-C does, so that files and progress are left in order."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # which alone receives signals
        return
    before = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)


def _end(message: str, error: BaseException, code: int) -> int:
    text = "; ".join([message, *getattr(error, "__notes__", ())])
    print("prox24:", *text.split(), file=sys.stderr)
    leave(code)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    top = argparse.ArgumentParser(
        prog="prox24", description="Prunes language models to N:M sparsity, in JAX."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_prune(commands)
    _add_distill(commands)
    _add_plan(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_demo(commands)
    return top


_Commands = argparse._SubParsersAction  # argparse has no public name for it


def _add_prune(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("prune", help="prune a checkpoint")
    command.set_defaults(run=prune.run)
    command.add_argument("source", type=Path, help=MODEL)
    command.add_argument("destination", type=Path, help="HF folder to write")
    _add_method(command)
    command.add_argument(
        "--pull",
        type=_positive_number,
        help="to the dense weight, with dense targets, relative to the Gram's trace (1)",
    )
    command.add_argument(
        "--damping",
        type=_nonnegative,
        default=0.01,
        help="relative to the Gram's mean diagonal (0.01)",
    )
    command.add_argument(
        "--calibration", type=Path, metavar="FILE", help="UTF-8 text (packaged speeches)"
    )
    command.add_argument("--samples", type=_positive, default=64, help="calibration windows (64)")
    command.add_argument(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="of the device, as 8GiB: the largest micro-batch that fits is used (default: one of "
        "about 2,048 tokens, which it is at the most with --refine)",
    )
    _add_shard_grams(command)
    command.add_argument(
        "--activations",
        choices=("memory", "disk"),
        default="memory",
        help="where hidden states are between layers; on disk, an interrupted run goes on without "
        "running the finished layers again",
    )
    command.add_argument(
        "--refine",
        choices=("none", "block"),
        default="none",
        help="train what is kept of each layer on the dense layer's output, after it is pruned",
    )
    command.add_argument(
        "--refine-rate",
        type=_positive_number,
        help="first rate of Adam, relative to the size of each tensor's entries (0.01)",
    )
    command.add_argument("--refine-passes", type=_positive, help="over the calibration windows (5)")
    command.add_argument(
        "--refine-step-tokens", type=_positive, help="of a step, about; a window has more (512)"
    )
    command.add_argument(
        "--refine-linears-only",
        action="store_true",
        help="leave norms, biases and routers as they are",
    )
    _add_compute_dtype(command, "--refine-compute-dtype")
    command.add_argument("--report", type=Path, metavar="FILE", help="write a JSON report")
    command.add_argument(
        "--distributed",
        action="store_true",
        help="share the work with other processes, each of which runs this command; under Slurm, "
        "GKE, Open MPI or on TPU VMs they find each other, elsewhere give the following three",
    )
    command.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    command.add_argument("--num-processes", type=_positive, metavar="N", help="that there are")
    command.add_argument("--process-id", type=_index, metavar="I", help="of this one, from 0")
    _add_writing(command)
    _add_length(command)
    _add_output(command)


def _add_distill(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "distill", help="train what is kept of a pruned model on what the dense one predicts"
    )
    command.set_defaults(run=distill.run)
    command.add_argument("dense", type=Path, help=f"the model that was pruned: {MODEL}")
    command.add_argument("pruned", type=Path, help="HF folder of the pruned model")
    command.add_argument("destination", type=Path, help="HF folder to write")
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to train on (packaged speeches)"
    )
    command.add_argument("--samples", type=_positive, default=64, help="windows of the text (64)")
    command.add_argument("--step-windows", type=_positive, default=1, help="windows of a step (1)")
    command.add_argument(
        "--micro-batches",
        type=_positive,
        default=1,
        metavar="K",
        help="compute the windows of a step in so many parts, for less memory (1)",
    )
    command.add_argument(
        "--tensor-parallel",
        type=_positive,
        default=1,
        metavar="DEVICES",
        help="that share heads and widths; the others share the windows (1)",
    )
    command.add_argument("--passes", type=_positive, default=1, help="over the windows (1)")
    command.add_argument(
        "--rate", type=_positive_number, default=2e-4, help="highest rate of Adam (2e-4)"
    )
    command.add_argument(
        "--warmup",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="of the steps, in which the rate rises, from 0 to 1 (0.1)",
    )
    command.add_argument(
        "--measurements",
        type=_positive,
        default=4,
        metavar="N",
        help="of the loss on what is held out, after each of which --state is written, at the most "
        "(4)",
    )
    _add_compute_dtype(command, "--compute-dtype")
    command.add_argument(
        "--cross-entropy",
        type=_share,
        default=0.0,
        help="share of the loss that is the text's own next tokens, from 0 to 1 (0)",
    )
    command.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="where the state of the training is kept; the same command goes on from there",
    )
    command.add_argument("--report", type=Path, metavar="FILE", help="write a JSON report")
    command.add_argument("--overwrite", action="store_true", help="replace the destination")
    _add_length(command)
    _add_output(command)


def _add_plan(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("plan", help="estimate the memory and the time of pruning")
    command.set_defaults(run=plan.run)
    command.add_argument("source", type=Path, help=MODEL)
    _add_method(command)
    command.add_argument("--samples", type=_positive, default=64, help="calibration windows (64)")
    command.add_argument("--devices", type=_positive, default=1, help="that share the work (1)")
    command.add_argument(
        "--memory", type=parse_size, metavar="SIZE", help="of a device, as 80GB: does it fit?"
    )
    command.add_argument(
        "--rate",
        type=_positive_number,
        metavar="OPERATIONS",
        help="per second and device, of float32 products at the highest precision (default: "
        "measured on this machine)",
    )
    _add_shard_grams(command)
    _add_length(command)
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_eval(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("eval", help="measure the perplexity of a checkpoint")
    command.set_defaults(run=evaluate.run)
    command.add_argument("model", type=Path, help=MODEL)
    command.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (packaged novel)")
    command.add_argument("--samples", type=_positive, help="windows (default: the whole text)")
    _add_length(command)
    _add_output(command, quiet="no progress bar")


def _add_generate(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("generate", help="go on from a prompt")
    command.set_defaults(run=generate.run)
    command.add_argument("model", type=Path, help=MODEL)
    command.add_argument("--prompt", required=True, metavar="TEXT")
    command.add_argument("--tokens", type=_positive, default=64, help="to generate at most (64)")
    command.add_argument(
        "--temperature", type=_nonnegative, default=0.0, help="0 for the most probable tokens (0)"
    )
    command.add_argument(
        "--top-p",
        type=_probability,
        default=1.0,
        metavar="P",
        help="draw from the most probable tokens that have this probability together (1)",
    )
    command.add_argument("--seed", type=_index, default=0, help="of the random draws (0)")
    command.add_argument(
        "--dtype", choices=DTYPES, help="of the weights in memory (default: the checkpoint's)"
    )
    command.add_argument(
        "--packed",
        action="store_true",
        help="keep the linears of a 2:4 model packed in memory",
    )
    _add_output(command, quiet="no progress bar")


def _add_verify(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("verify", help="check a pruned model, its manifest and source")
    command.set_defaults(run=verify.run)
    command.add_argument("model", type=Path, help=MODEL)
    command.add_argument("--source", type=Path, help="model that it was pruned from")
    command.add_argument("--report", type=Path, metavar="FILE", help="write a JSON report")
    _add_pattern(command)
    _add_output(command)


def _add_inspect(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("inspect", help="list what would be pruned, or diagnose Grams")
    command.set_defaults(run=inspect_model.run)
    command.add_argument("source", type=Path, help=MODEL)
    command.add_argument(
        "--calibration", type=Path, metavar="FILE", help="UTF-8 text (packaged speeches)"
    )
    command.add_argument("--samples", type=_positive, default=64, help="calibration windows (64)")
    _add_pattern(command)
    command.add_argument(
        "--grams", action="store_true", help="diagnose the Gram of every input of a linear"
    )
    command.add_argument(
        "--figure", type=Path, metavar="FILE", help="of the Grams, a .png or .svg file"
    )
    _add_length(command)
    _add_output(command)


def _add_convert(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("convert", help="write a checkpoint in another format")
    command.set_defaults(run=convert.run)
    command.add_argument("source", type=Path, help=MODEL)
    command.add_argument("destination", type=Path, help="HF folder to write")
    command.add_argument("--format", choices=OUTPUTS, default="safetensors")
    _add_writing(command)
    _add_output(command, quiet="no summary")


def _add_demo(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("demo", help="prune SmolLM2-135M and compare methods")
    command.set_defaults(run=demo.run)
    command.add_argument("--cache", type=Path, default=Path(".cache"), help="for the download")
    command.add_argument("--output", type=Path, default=Path("."), help="folder for the models")
    command.add_argument(
        "--calibration", type=Path, metavar="FILE", help="UTF-8 text (packaged speeches)"
    )
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to evaluate on (packaged novel)"
    )
    command.add_argument("--samples", type=_positive, default=16, help="calibration windows (16)")
    command.add_argument(
        "--evaluation-samples", type=_positive, default=16, help="evaluation windows (16)"
    )
    _add_length(command)
    _add_output(command, quiet="no progress bar")


def _add_method(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", choices=SOLVERS, default="admm")
    command.add_argument(
        "--refit",
        choices=[*REFITS, "none"],
        help="update of the kept weights: conjugate gradients, gradient descent, least squares, "
        "swaps of kept for pruned weights, or none (default: cg after prox and admm, else none)",
    )
    command.add_argument(
        "--targets",
        choices=("pruned", "dense"),
        help="reproduce each linear's output on the pruned model's activations, or what it was in "
        "the dense model (default: dense with prox and admm, for models that prox24 runs itself, "
        "else pruned)",
    )
    _add_pattern(command)


def _add_pattern(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pattern", type=parse_pattern, default=Pattern(2, 4), help="N:M (2:4), or P%% of zeros"
    )


def _add_writing(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=DTYPES, help="of the output (default: the source's)")
    command.add_argument(
        "--shard-size",
        type=parse_size,
        metavar="SIZE",
        help="of the largest file, as 5GB or 500MiB (default: the source's files)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the destination")


def _add_shard_grams(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shard-grams",
        action="store_true",
        help="divide the columns of Grams and weights among the devices, instead of the rows of "
        "weights: for Grams of which a device cannot hold several, or for many devices; with "
        "magnitude, wanda or admm, and cg or no refit",
    )


def _add_compute_dtype(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument(
        name,
        choices=COMPUTE_DTYPES,
        default="float32",
        help="in which a training multiplies with linears; bfloat16 is for accelerators, and CPUs "
        "that multiply it by instructions of their own (float32)",
    )


def _add_length(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--sequence-length", type=_length, default=512, help="tokens of a window (512)"
    )


def _add_output(
    command: argparse.ArgumentParser, quiet: str = "no progress bar, no summary"
) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--quiet", action="store_true", help=quiet)


def parse_pattern(text: str) -> Pattern | Unstructured:
    """Reads "N:M", or "P%".

    Example:
      >>> parse_pattern("2:4"), parse_pattern("50%")
      (Pattern(kept=2, group=4), Unstructured(sparsity=0.5))
    """
    try:
        if text.endswith("%"):
            return Unstructured(float(text.removesuffix("%")) / 100)
        kept, group = text.split(":")
        return as_pattern((int(kept), int(group)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither N:M with 1 <= N <= M nor a percentage below 100%"
        ) from error


def parse_size(text: str) -> int:
    """Reads a number of bytes with its unit.

    Example:
      >>> parse_size("5GB"), parse_size("1.5KiB")
      (5000000000, 1536)
    """
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MiB")
    return size


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _index(text: str) -> int:
    return _at_least(text, 0)


def _length(text: str) -> int:
    return _at_least(text, 2)


def _at_least(text: str, least: int, end: int = 2**63) -> int:
    if not text.isdecimal() or not least <= int(text) < end:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {end - 1}")
    return int(text)


def _positive_number(text: str) -> float:
    value = _nonnegative(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _share(text: str) -> float:
    value = _nonnegative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _probability(text: str) -> float:
    value = _positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1")
    return value


def _nonnegative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a nonnegative number")
    return value
