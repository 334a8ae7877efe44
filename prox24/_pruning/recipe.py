"""`Recipe`: all settings of how a model is pruned."""

import dataclasses
import functools
import inspect
import json
import math
import numbers
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

from prox24._core.counts import check_whole
from prox24._core.pattern import AnyPattern, Pattern, PatternLike, Unstructured, as_any_pattern
from prox24._core.precision import PRODUCTS, check_products, products
from prox24._pruning._fields import build, decode, encode
from prox24._pruning._yaml import from_yaml, to_yaml
from prox24._solvers.admm import ADMM
from prox24._solvers.hyperparameters import REGISTERED
from prox24._solvers.problem import DEFAULT_PULL
from prox24._solvers.protocol import Refit, Solver
from prox24._solvers.proximal import ProximalGradient
from prox24._solvers.refit import ConjugateGradients, GradientSteps
from prox24._solvers.scores import Magnitude, Wanda
from prox24._solvers.solve import check_supported
from prox24._solvers.sparsegpt import SparseGPT
from prox24.errors import RecipeError
from prox24.refine._blocks import BlockRefinement

VERSION = 1
"""The version of the JSON form."""

DENSE = "dense"
"""The pattern of tensors that stay dense, in a pattern by tensor."""

TRAINED_TOKENS = 163_840
"""The tokens of a block refinement: five passes over 32,768 tokens, as in docs/results.md."""


@dataclasses.dataclass(frozen=True)
class DenseTargets:
    """Each linear reproduces the dense model's output, not its own.

    The dense model runs next to the pruned one. See `prox24.correct_inputs` for the mathematics.

    Attributes:
      pull: strength of the pull towards the dense weight, in units of trace(G). Positive.

    Raises:
      ValueError: the pull is not positive and finite.
    """

    pull: float = DEFAULT_PULL

    def __post_init__(self) -> None:
        if not 0 < self.pull < math.inf:
            raise ValueError(f"pull {self.pull} is not a positive number")


@dataclasses.dataclass(frozen=True)
class HeadBasis:
    """Learns a basis for each attention head, to lower the loss from pruning.

    An orthogonal matrix turns the rows of a head's values, and the columns that read them. A second
    matrix turns the entries of queries and keys that no rotary position and no norm changes. The
    dense model computes the same function, and the pruned model takes no more time. A head is
    turned only if all its linears are pruned to N:M, and no block reaches beyond the head. See
    `prox24.basis.learn` for the mathematics.

    Attributes:
      steps: of Adam, for values and for queries and keys.

    Raises:
      ValueError: the steps are not positive, or not whole.
    """

    steps: int = 50

    def __post_init__(self) -> None:
        check_whole("steps", self.steps)
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} is not a positive number")


PatternsByTensor = tuple[tuple[str, Pattern | Unstructured | str], ...]

FIELDS: dict[str, tuple[Any, str]] = {
    "solver": (Callable, "a solver, such as prox24.ADMM()"),
    "refit": (Callable | None, "a refit, such as prox24.ConjugateGradients(), or None"),
    "damping": (numbers.Real, "a number"),
    "targets": (DenseTargets | None, "a prox24.DenseTargets or None"),
    "basis": (HeadBasis | None, "a prox24.HeadBasis or None"),
    "refine": (BlockRefinement | None, "a prox24.BlockRefinement or None"),
    "keep_dense": (int | float, "a count or a share"),
    "dtype": (str | None, "the name of a dtype or None"),
    "products": (str, "a name"),
}
"""The types of a recipe's fields, and what an error says of them."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is pruned. Frozen, comparable, printable; to JSON and back without a loss.

    `Recipe()` is the best known recipe without training. `best` adds training of the kept weights.
    `magnitude`, `wanda`, `sparsegpt` and `paper` follow their papers.

    Attributes:
      solver: finds the mask and the weights of a linear.
      refit: updates the kept weights afterwards; None leaves them as the solver found them.
      pattern: N:M along the input axis, or the share of zeros, as "50%". In Python and in files it
        can also be a list of pairs (regular expression, pattern). Then a tensor has the pattern of
        the first expression that is found in its name. It stays dense if this pattern is "dense",
        or if none is found.
      damping: added to the diagonal of a Gram, in units of its mean.
      targets: `DenseTargets` to reproduce the dense model's outputs; None to reproduce each
        linear's own output on the pruned model's activations.
      basis: `HeadBasis` to turn attention heads before they are pruned; None leaves them. Models
        that run by torchax, and `prune_params`, ignore it.
      refine: trains the kept weights of each layer after it is pruned; None does not.
      only: regular expression; only tensors in whose names it is found are pruned.
      skip: regular expression; tensors in whose names it is found stay dense.
      keep_dense: the linears that lose most stay dense: a count, or a share below 1.
      dtype: of the written weights, "float32", "float16" or "bfloat16"; None keeps each tensor's
        own.
      products: of float32 matrices: "float32", or "tf32x3" for three TF32 products on NVIDIA GPUs.

    Raises:
      RecipeError: a field has a wrong type or is out of range; names the field.

    Example:
      >>> recipe = Recipe(pattern=(2, 4), skip="layers.0.")
      >>> Recipe.from_json(recipe.to_json()) == recipe
      True
    """

    solver: Solver = ADMM()
    refit: Refit | None = ConjugateGradients()
    pattern: PatternLike | Unstructured | str | PatternsByTensor = Pattern(2, 4)
    damping: float = 0.01
    targets: DenseTargets | None = DenseTargets()
    basis: HeadBasis | None = HeadBasis()
    refine: BlockRefinement | None = None
    only: str | None = None
    skip: str | None = None
    keep_dense: int | float = 0
    dtype: str | None = None
    products: str = "float32"

    def __post_init__(self) -> None:
        for name, (kinds, wanted) in FIELDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool | type):
                raise RecipeError(f"{name} {value!r} is not {wanted}")
        object.__setattr__(self, "pattern", _checked_pattern(self.pattern))
        if not 0 <= self.damping < math.inf:
            raise RecipeError(f"damping {self.damping} is not a nonnegative number")
        for name in ("only", "skip"):
            _check_expression(name, getattr(self, name))
        count = self.keep_dense
        if not count >= 0 or (not isinstance(count, int) and count >= 1):
            raise RecipeError(f"keep_dense {count} is neither a count nor a share below 1")
        if self.dtype not in (None, "float32", "float16", "bfloat16"):
            raise RecipeError(f"dtype {self.dtype!r} is not float32, float16 or bfloat16")
        if self.products not in PRODUCTS:
            raise RecipeError(f"products {self.products!r} is not {' or '.join(PRODUCTS)}")

    @classmethod
    def best(cls, tokens: int = 32_768) -> Self:
        """The default recipe, with training of the kept weights of each layer.

        Args:
          tokens: number of tokens of the calibration text. More tokens mean fewer passes over each.

        Raises:
          RecipeError: the number is not positive.
        """
        if tokens < 1:
            raise RecipeError(f"tokens {tokens} is not a positive number")
        passes = max(1, round(TRAINED_TOKENS / tokens))
        return cls(refine=BlockRefinement(passes=passes))

    @classmethod
    def proximal(cls) -> Self:
        """Accelerated proximal gradients in place of ADMM."""
        return cls(ProximalGradient())

    @classmethod
    def paper(cls) -> Self:
        """The iteration of arXiv 2501.18015: no momentum, then 1,000 gradient steps."""
        return cls(ProximalGradient.paper(), GradientSteps(), targets=None, basis=None)

    @classmethod
    def sparsegpt(cls) -> Self:
        """SparseGPT, arXiv 2301.00774."""
        return cls(SparseGPT(), None, targets=None, basis=None)

    @classmethod
    def wanda(cls) -> Self:
        """Wanda, arXiv 2306.11695."""
        return cls(Wanda(), None, targets=None, basis=None)

    @classmethod
    def magnitude(cls) -> Self:
        """Keeps the largest weights."""
        return cls(Magnitude(), None, targets=None, basis=None)

    def pattern_of(self, tensor: str) -> AnyPattern | None:
        """The pattern of a tensor by its name; None if it stays dense.

        Example:
          >>> recipe = Recipe(pattern=(("mlp", (2, 4)), ("v_proj", "dense"), ("attn", (4, 8))))
          >>> print(recipe.pattern_of("0.mlp.up"), recipe.pattern_of("0.attn.v_proj"))
          2:4 None
        """
        if self.only is not None and not re.search(self.only, tensor):
            return None
        if self.skip is not None and re.search(self.skip, tensor):
            return None
        found = (pattern for expression, pattern in self._pairs if re.search(expression, tensor))
        return next(found, None)

    @property
    def patterns(self) -> list[AnyPattern]:
        """Every pattern that a tensor may have."""
        return [pattern for _, pattern in self._pairs if pattern is not None]

    @property
    def expressions(self) -> list[str]:
        """The regular expressions of patterns by tensor; empty for a single pattern."""
        return [expression for expression, _ in self._pairs if expression]

    @property
    def _pairs(self) -> list[tuple[str, AnyPattern | None]]:
        given: Any = self.pattern
        pairs = [("", given)] if isinstance(given, Pattern | Unstructured) else given
        return [(expression, None if own == DENSE else own) for expression, own in pairs]

    def check_supported(self) -> None:
        """Raises RecipeError if the solver or the refit does not support a pattern."""
        try:
            for pattern in self.patterns:
                check_supported(self.solver, self.refit, pattern)
        except ValueError as error:
            raise RecipeError(str(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a dict that JSON can hold.

        Raises:
          RecipeError: a part has no JSON form, such as an optax transformation in a refit. The
            message names the part.
        """
        return {"recipe": VERSION} | {
            field.name: encode(getattr(self, field.name), f"recipe.{field.name}")
            for field in dataclasses.fields(self)
        }

    def to_json(self) -> str:
        """The recipe as JSON text; `from_json` reads it back without a loss.

        Raises:
          RecipeError: see `to_dict`.
        """
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """A recipe from the dict of `to_dict`, or from a manifest or report with one.

        A missing field has its default.

        Raises:
          RecipeError: the version or a field is unknown, or a value does not fit. The message names
            the version or the field.
        """
        if not isinstance(given, Mapping):
            raise RecipeError(f"a recipe is an object of fields, not {given!r}")
        if isinstance(given.get("recipe"), Mapping):  # a manifest or a report
            given = given["recipe"]
        version = given.get("recipe", VERSION)
        if type(version) is not int or version != VERSION:
            raise RecipeError(f"version {version!r} of recipes is unknown; this is {VERSION}")
        fields = {key: value for key, value in given.items() if key != "recipe"}
        pattern = fields.pop("pattern", cls.pattern)
        return dataclasses.replace(build(cls, fields, "recipe"), pattern=pattern)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """A recipe from JSON text.

        Raises:
          RecipeError: the text is not JSON; or see `from_dict`.
        """
        try:
            given = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"the recipe is not JSON: {error}") from error
        return cls.from_dict(given)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a recipe from a .json file, or from a .yaml or .yml file if PyYAML is installed.

        Raises:
          RecipeError: the file cannot be read; or see `from_dict`. The message names the file.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise RecipeError(f"cannot read {path}: {reason}") from error
        try:
            if path.suffix in (".yaml", ".yml"):
                return cls.from_dict(from_yaml(text))
            return cls.from_json(text)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the recipe to a file that `load` reads.

        Raises:
          RecipeError: see `to_dict`; or the file is YAML and PyYAML is not installed.
        """
        path, text = Path(path), self.to_json() + "\n"
        if path.suffix in (".yaml", ".yml"):
            text = to_yaml(self.to_dict())
        path.write_text(text, encoding="utf-8")


REGISTERED |= {
    cls.__name__: cls for cls in (DenseTargets, HeadBasis, BlockRefinement, Unstructured)
}

PRESETS: dict[str, Callable[[], Recipe]] = {
    "admm": Recipe,
    "best": Recipe.best,
    "prox": Recipe.proximal,
    "paper": Recipe.paper,
    "sparsegpt": Recipe.sparsegpt,
    "wanda": Recipe.wanda,
    "magnitude": Recipe.magnitude,
}
"""Recipes by their names on the command line."""


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def with_products(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function with an argument `recipe`; it runs with the products of the recipe."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            given = signature.bind_partial(*args, **kwargs).arguments.get("recipe", Recipe())
        except TypeError:
            return function(*args, **kwargs)  # Python's error names the function.
        if not isinstance(given, Recipe):
            raise RecipeError(
                f"{given!r} is no recipe: write prox24.Recipe(solver), or Recipe.from_dict(fields)"
            )
        check_products(given.products)
        with products(given.products):
            return function(*args, **kwargs)

    return run


def _checked_pattern(pattern: Any) -> Any:
    """The pattern, or the patterns by tensor, with every part checked."""
    by_tensor = isinstance(pattern, tuple | list) and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in pattern
    )
    if isinstance(pattern, Mapping) and "sparsity" not in pattern:
        raise RecipeError("pattern is a dict: give a list of pairs (regular expression, pattern)")
    if not by_tensor or not pattern:
        return _one_pattern("pattern", pattern)
    pairs = []
    for expression, own in pattern:
        place = f"the pattern of {expression!r}"
        _check_expression("pattern", expression)
        pairs.append((expression, own if own == DENSE else _one_pattern(place, own)))
    return tuple(pairs)


def _one_pattern(place: str, pattern: Any) -> AnyPattern:
    if isinstance(pattern, Mapping):  # a share of zeros, in its JSON form
        return decode(pattern, Unstructured, "recipe.pattern")
    try:
        return as_any_pattern(pattern)
    except ValueError as error:
        raise RecipeError(f"{place}: {error}") from error


def _check_expression(name: str, expression: str | None) -> None:
    try:
        re.compile(expression or "")
    except (re.error, TypeError) as error:
        raise RecipeError(f"{name} {expression!r} is no regular expression: {error}") from error
