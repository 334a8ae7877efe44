"""Options that commands share, and options for the fields of a recipe."""

import argparse
import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prox24._core.pattern import AnyPattern, as_any_pattern
from prox24._core.precision import PRODUCTS
from prox24._pruning.recipe import PRESETS, DenseTargets, HeadBasis, Recipe
from prox24._solvers.solve import REFITS
from prox24.errors import RecipeError
from prox24.refine._blocks import BlockRefinement

MODEL = "HF folder, GGUF file, or the hub's OWNER/NAME[@REVISION]"
DTYPES = ("float32", "float16", "bfloat16")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
OF_RECIPE = ("pattern", "damping", "only", "skip", "keep_dense", "dtype", "products")
"""Fields of a recipe with an option of the same name."""

PARTS: dict[str, tuple[str, str, type, str]] = {
    "targets": ("pruned", "dense", DenseTargets, ""),
    "basis": ("none", "heads", HeadBasis, "basis_"),
    "refine": ("none", "block", BlockRefinement, "refine_"),
}
"""Parts of a recipe: the choices for off and on, the class, and the prefix of its options."""

PARTS_HELP = {
    "targets": "each linear reproduces its own output in the pruned model, or the dense model's",
    "basis": "learn a basis for each attention head in which the pattern costs less, or do not",
    "refine": "train what is kept of each layer, or do not",
}


def add_recipe(command: argparse.ArgumentParser) -> None:
    """Adds the options that `recipe_of` reads."""
    group = command.add_argument_group(
        "recipe", "How the model is pruned. Options change parts of the method or of the file."
    )
    base = group.add_mutually_exclusive_group()
    base.add_argument("--method", choices=PRESETS, help="a recipe of the package (default: admm)")
    base.add_argument("--recipe", type=Path, metavar="FILE", help="a recipe as JSON or YAML")
    group.add_argument(
        "--refit",
        choices=[*REFITS, "none"],
        help="how the kept weights are updated afterwards (default: that of the method)",
    )
    for name in OF_RECIPE:
        add_field(group, Recipe, name)
    for name, (off, on, cls, prefix) in PARTS.items():
        group.add_argument(
            option(name),
            choices=(off, on),
            help=f"{PARTS_HELP[name]} (default: that of the method)",
        )
        for field in dataclasses.fields(cls):
            add_field(group, cls, field.name, prefix)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe of a method or a file, changed by the given options."""
    if arguments.recipe is not None:
        recipe = Recipe.load(arguments.recipe)
    elif arguments.method == "best" and "samples" in arguments:
        from prox24._jobs.text import shape_of

        text = text_of(arguments, vars(arguments).get("calibration"))
        recipe = Recipe.best(math.prod(shape_of(text)))
    else:
        recipe = PRESETS[arguments.method or "admm"]()
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    changes: dict[str, Any] = {name: given[name] for name in OF_RECIPE if name in given}
    if "refit" in given:
        changes["refit"] = None if given["refit"] == "none" else REFITS[given["refit"]]()
    for name, (off, on, cls, prefix) in PARTS.items():
        value = getattr(recipe, name)
        if given.get(name) == off:
            value = None
        elif given.get(name) == on and value is None:
            value = cls()
        own = {field.name: prefix + field.name for field in dataclasses.fields(cls)}
        fields = {field: given[key] for field, key in own.items() if key in given}
        if fields and value is None:
            raise RecipeError(f"{option(own[next(iter(fields))])} is for --{name} {on}")
        changes[name] = dataclasses.replace(value, **fields) if fields else value
    return dataclasses.replace(recipe, **changes)


def option(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def add_field(group: Any, cls: type, name: str, prefix: str = "") -> None:
    """Adds an option for a field of a dataclass; the class's docstring has the help text."""
    default, help_text = getattr(cls, name), attribute_help(cls)[name]
    if isinstance(default, bool):
        group.add_argument(option(prefix + name), action="store_const", const=True, help=help_text)
        return
    shown = "" if default is None else f" (default: {default})"
    group.add_argument(
        option(prefix + name),
        type=KINDS.get(name, KINDS.get(type(default), str)),
        choices=CHOICES.get(name),
        metavar=METAVARS.get(name),
        help=(help_text + shown).replace("%", "%%"),
    )


def attribute_help(cls: type) -> dict[str, str]:
    """The texts of the attributes of a docstring, by name."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^  (\w+): ((?:.|\n {4})*)", section, re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in found}


def add_output(
    command: argparse.ArgumentParser, quiet: str = "no progress bar, no summary"
) -> None:
    """Adds --json and --quiet."""
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--quiet", action="store_true", help=f"print {quiet}")


def add_logs(command: argparse.ArgumentParser) -> None:
    """Adds --report, --log-file and --metrics."""
    command.add_argument(
        "--report", type=report_file, metavar="FILE", help="write a report, .json or .html"
    )
    command.add_argument(
        "--log-file", type=Path, metavar="FILE", help="append a line for each layer"
    )
    command.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help="append a JSON object for each linear, and each step and measurement of a training",
    )


def add_windows(
    command: argparse.ArgumentParser,
    name: str,
    what: str,
    samples: int | str = 64,
    last: str = "",
) -> None:
    """Adds a text, --text-field, --samples and --sequence-length; `last` ends the text's help."""
    command.add_argument(
        option(name),
        action="append",
        metavar="TEXT",
        help=f"{what}: a file or folder of .txt, .jsonl, .ndjson, .json, .csv, .tsv or .parquet, "
        f"token ids as .npy, hf:OWNER/NAME[#CONFIG][:SPLIT] of the hub{last}; may be given several "
        "times",
    )
    command.add_argument(
        "--text-field",
        metavar="NAME",
        help="field of a record, with a text or messages (default: text, or else messages)",
    )
    add_sizes(command, samples)


def add_training_windows(command: argparse.ArgumentParser, name: str, what: str) -> None:
    """Adds the options of `add_windows`, --sampling and --seed."""
    add_windows(
        command,
        name,
        f"{what} (default: speeches of the package)",
        last=", or generate:N for N more windows, which the dense model writes",
    )
    command.add_argument(
        "--sampling",
        choices=("even", "random", "documents"),
        default="even",
        help="even: equal distances in the joined documents; random: drawn from them; "
        "documents: the beginning of each document (default: even)",
    )
    command.add_argument(
        "--seed", type=index, default=0, help="of windows that are drawn or written (default: 0)"
    )


def text_of(arguments: argparse.Namespace, source: Any) -> Any:
    """The `Text` of a source and the given options."""
    from prox24._jobs.text import Text

    sizes = arguments.samples, arguments.sequence_length, vars(arguments).get("text_field")
    sampling = {name: vars(arguments)[name] for name in ("sampling", "seed") if name in arguments}
    return Text(source, *sizes, **sampling)


def add_sizes(command: argparse.ArgumentParser, samples: int | str = 64) -> None:
    """Adds --samples and --sequence-length."""
    command.add_argument("--samples", type=positive, help=f"windows (default: {samples})")
    command.add_argument(
        "--sequence-length", type=length, default=512, help="tokens of a window (default: 512)"
    )


def add_writing(command: argparse.ArgumentParser) -> None:
    """Adds --shard-size and --overwrite."""
    command.add_argument(
        "--shard-size",
        type=size,
        metavar="SIZE",
        help="of the largest file, as 5GB or 500MiB (default: the source's files)",
    )
    add_overwrite(command)


def add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--overwrite", action="store_true", help="replace the model at the destination"
    )


def report_file(text: str) -> Path:
    """A type of arguments: a file whose suffix, if any, is a form of reports."""
    if Path(text).suffix not in ("", ".json", ".html"):
        raise argparse.ArgumentTypeError(f"{text!r} ends in neither .json nor .html")
    return Path(text)


def pattern(text: str) -> AnyPattern:
    """Reads "N:M", "N:MxU", or "P%"."""
    try:
        return as_any_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size(text: str) -> int:
    """Reads a number of bytes with its unit."""
    # More digits may be an infinite float.
    found = re.fullmatch(rf"(\d{{1,15}}(?:\.\d+)?) ?({'|'.join(UNITS)})", text)
    count = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if not count:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MiB")
    return count


def _integer(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {most}")
        return int(text)

    return read


index, positive, length = map(_integer, (0, 1, 2))


def _number(said: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {said}")
        return value

    return read


nonnegative = _number("nonnegative number", lambda value: 0 <= value < math.inf)
positive_number = _number("positive number", lambda value: 0 < value < math.inf)
share = _number("number from 0 to 1", lambda value: 0 <= value <= 1)
probability = _number("number above 0, to 1", lambda value: 0 < value <= 1)


def count_or_share(text: str) -> int | float:
    """Reads a count, or a share below 1."""
    return int(text) if text.isdecimal() else nonnegative(text)


KINDS: dict[Any, Callable[[str], Any]] = {
    "pattern": pattern,
    "keep_dense": count_or_share,
    "damping": nonnegative,
    "held_out": share,
    "cross_entropy": share,
    "warmup": share,
    float: positive_number,
    int: positive,
}
"""Functions that read the value of an option, by the name or the type of its field."""

CHOICES = {"dtype": DTYPES, "compute_dtype": ("float32", "bfloat16"), "products": tuple(PRODUCTS)}

METAVARS = {"pattern": "N:M", "only": "REGEX", "skip": "REGEX", "keep_dense": "COUNT"}
