"""Options that commands share, and those that are made from the fields of a recipe."""

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prox24._core.pattern import AnyPattern, as_any_pattern
from prox24._pruning.recipe import PRESETS, DenseTargets, Recipe
from prox24._solvers.solve import REFITS
from prox24.errors import RecipeError
from prox24.refine._blocks import BlockRefinement

MODEL = "HF folder, GGUF file, or the hub's OWNER/NAME[@REVISION]"
DTYPES = ("float32", "float16", "bfloat16")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
OF_RECIPE = ("pattern", "damping", "only", "skip", "keep_dense", "dtype")
"""Fields of a recipe that are options by themselves."""


def add_recipe(command: argparse.ArgumentParser) -> None:
    """Adds the options that `recipe_of` reads."""
    group = command.add_argument_group(
        "recipe", "How the model is pruned. Options change parts of the method or of the file."
    )
    base = group.add_mutually_exclusive_group()
    base.add_argument("--method", choices=PRESETS, help="a recipe of the package (default: admm)")
    base.add_argument("--recipe", type=Path, metavar="FILE", help="a recipe as JSON or YAML")
    group.add_argument(
        "--refit", choices=[*REFITS, "none"], help="how the kept weights are updated afterwards"
    )
    for name in OF_RECIPE:
        add_field(group, Recipe, name)
    group.add_argument(
        "--targets",
        choices=("pruned", "dense"),
        help="each linear reproduces its own output in the pruned model, or the dense model's",
    )
    add_field(group, DenseTargets, "pull")
    group.add_argument(
        "--refine", choices=("none", "block"), help="train what is kept of each layer, or do not"
    )
    for field in dataclasses.fields(BlockRefinement):
        add_field(group, BlockRefinement, field.name, "refine_")


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe of a method or a file, with the options that were given.

    Raises:
      RecipeError: the file cannot be read, or an option does not fit the others.
    """
    if arguments.recipe is not None:
        recipe = Recipe.load(arguments.recipe)
    else:
        recipe = PRESETS[arguments.method or "admm"]()
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    changes: dict[str, Any] = {name: given[name] for name in OF_RECIPE if name in given}
    if "refit" in given:
        changes["refit"] = None if given["refit"] == "none" else REFITS[given["refit"]]()
    changes["targets"] = _part(given, "targets", {"pruned": None, "dense": DenseTargets}, recipe)
    changes["refine"] = _part(
        given, "refine", {"none": None, "block": BlockRefinement}, recipe, "refine_"
    )
    return dataclasses.replace(recipe, **changes)


def _part(
    given: Mapping[str, Any],
    name: str,
    choices: Mapping[str, Any],
    recipe: Recipe,
    prefix: str = "",
) -> Any:
    """The part of a recipe that is on or off, with the fields that were given."""
    (off, _), (on, cls) = choices.items()
    part = getattr(recipe, name)
    if given.get(name) == off:
        part = None
    elif given.get(name) == on and part is None:
        part = cls()
    fields = {
        field.name: given[prefix + field.name]
        for field in dataclasses.fields(cls)
        if prefix + field.name in given
    }
    if fields and part is None:
        raise RecipeError(f"{option(prefix + next(iter(fields)))} is for --{name} {on}")
    return part if part is None or not fields else dataclasses.replace(part, **fields)


def option(name: str) -> str:
    """The option of a field.

    Example:
      >>> option("refine_rate")
      '--refine-rate'
    """
    return "--" + name.replace("_", "-")


def add_field(group: Any, cls: type, name: str, prefix: str = "") -> None:
    """Adds an option for a field of a dataclass, with the help of the class's docstring."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    kind, help_text = _kind(cls, name), attribute_help(cls)[name]
    if kind is bool:
        group.add_argument(option(prefix + name), action="store_const", const=True, help=help_text)
        return
    shown = "" if field.default is None else f" (default: {field.default})"
    group.add_argument(
        option(prefix + name),
        type=KINDS.get(name, KINDS.get(kind, str)),
        choices=CHOICES.get(name),
        metavar=METAVARS.get(name),
        help=(help_text + shown).replace("%", "%%"),
    )


def _kind(cls: type, name: str) -> Any:
    hint = typing.get_type_hints(cls)[name]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return kinds[0]


def attribute_help(cls: type) -> dict[str, str]:
    """The texts of the attributes of a docstring, by name.

    Example:
      >>> attribute_help(DenseTargets)["pull"].startswith("strength of the pull")
      True
    """
    (section,) = re.findall(r"Attributes:\n((?: {2,}.*\n|\n)*)", inspect.getdoc(cls) or "")
    found: dict[str, str] = {}
    for line in section.splitlines():
        if match := re.fullmatch(r"  (\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif line.strip() and found:
            found[name] += " " + line.strip()
    return {name: text.rstrip(".") for name, text in found.items()}


def add_output(
    command: argparse.ArgumentParser, quiet: str = "no progress bar, no summary"
) -> None:
    """Adds --json and --quiet."""
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--quiet", action="store_true", help=f"print {quiet}")


def add_windows(
    command: argparse.ArgumentParser, name: str, what: str, samples: int | str = 64
) -> None:
    """Adds a text file, --samples and --sequence-length."""
    command.add_argument(option(name), type=Path, metavar="FILE", help=what)
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
    command.add_argument("--overwrite", action="store_true", help="replace the destination")


def pattern(text: str) -> AnyPattern:
    """Reads "N:M", or "P%"."""
    return _or_error(as_any_pattern, text)


def size(text: str) -> int:
    """Reads a number of bytes with its unit.

    Example:
      >>> size("5GB"), size("1.5KiB")
      (5000000000, 1536)
    """
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text)
    count = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if not count:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MiB")
    return count


def positive(text: str) -> int:
    """Reads an integer from 1."""
    return at_least(text, 1)


def index(text: str) -> int:
    """Reads an integer from 0."""
    return at_least(text, 0)


def length(text: str) -> int:
    """Reads an integer from 2."""
    return at_least(text, 2)


def at_least(text: str, least: int, end: int = 2**63) -> int:
    """Reads an integer from `least`, below `end`."""
    if not text.isdecimal() or not least <= int(text) < end:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {end - 1}")
    return int(text)


def nonnegative(text: str) -> float:
    """Reads a finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a nonnegative number")
    return value


def positive_number(text: str) -> float:
    """Reads a finite number above 0."""
    value = nonnegative(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def share(text: str) -> float:
    """Reads a number from 0 to 1."""
    value = nonnegative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def probability(text: str) -> float:
    """Reads a number above 0, to 1."""
    value = positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1")
    return value


def count_or_share(text: str) -> int | float:
    """Reads a count, or a share below 1.

    Example:
      >>> count_or_share("12"), count_or_share("0.05")
      (12, 0.05)
    """
    return int(text) if text.isdecimal() else nonnegative(text)


def _or_error(read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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
"""How an option is read, by the name of its field or by its type."""

CHOICES = {"dtype": DTYPES, "compute_dtype": ("float32", "bfloat16")}

METAVARS = {"pattern": "N:M", "only": "REGEX", "skip": "REGEX", "keep_dense": "COUNT"}
