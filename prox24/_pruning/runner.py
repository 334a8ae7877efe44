"""The protocol that a model follows to be pruned: stages with weights, linears and inputs."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from prox24._pruning.recipe import Recipe
from prox24.basis import Places
from prox24.errors import CheckpointError, RecipeError

State = TypeVar("State")

Apply = Callable[[dict[str, Array], Array], Array]
"""A layer as a function of its weights and its input."""


class Linear(NamedTuple):
    """A weight that can be pruned: its name, its input's, and the width that M has to divide.

    Linears that share an input share its Gram.
    """

    tensor: str
    input: str
    width: int


class Side(NamedTuple):
    """A linear whose outputs (axis 0) or inputs (axis 1) may be turned; see `prox24.basis`."""

    tensor: str
    bias: str | None  # turned with its outputs
    input: str
    axis: int
    places: Places


class Inputs(NamedTuple):
    """What one matrix was multiplied with: the Gram, sum of x x^T, of so many tokens.

    The cross-Gram is the sum of x' x^T, with x' the same tokens' inputs in the dense model; None
    where they are the same.
    """

    gram: Array
    tokens: int
    cross: Array | None = None


class Streams(NamedTuple):
    """Whether the dense model runs alongside the pruned one, and whether it makes cross-Grams."""

    dense: bool
    crosses: bool


class Runner(Protocol[State]):
    """A model, as the loop prunes it: in stages, each one seeing the pruned ones before it.

    A stage is a layer of a decoder, or the weights of a function that share an input. `State` is
    what a runner takes from one stage to the next, such as hidden states. Only the runner looks
    into it. Methods with a body serve a runner whose weights are matrices (out, in).
    """

    @property
    def stages(self) -> int:
        """Their number."""

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the work; None for a single one."""
        return None

    def linears(self, index: int) -> Sequence[Linear]:
        """The linears of a stage, in the order of pruning."""

    def tensors(self, index: int) -> Collection[str]:
        """The names of a stage's tensors."""

    def ties(self, index: int) -> Sequence[Sequence[Side]]:
        """The linears of a stage that may be turned together.

        Each consists of one matrix, and no other linear reads the inputs that are turned.
        """
        return []

    def weights(self, index: int) -> dict[str, Array]:
        """The dense weights of a stage, by tensor."""

    def enter(self, streams: Streams) -> tuple[int, State]:
        """The first stage to run, and the state before it."""

    def observe(
        self, index: int, weights: Mapping[str, Array], state: State, wanted: Collection[str]
    ) -> tuple[Mapping[str, list[Inputs]], State]:
        """The inputs of a stage's linears; the dense model, if it runs, moves on to the next stage.

        The weights are the dense ones. For each name that is wanted there is one `Inputs` for each
        matrix.
        """

    def advance(self, index: int, weights: Mapping[str, Array], state: State) -> State:
        """The state after a stage that has these weights; the dense model has moved on before."""

    def dtype(self, tensor: str) -> np.dtype[Any]:
        """The dtype of a tensor of a stage where the recipe has none."""

    def matrices(self, linear: Linear, weight: Array) -> list[Array]:
        """The matrices (out, in) that a weight consists of."""
        return [weight]

    def joined(self, linear: Linear, matrices: list[Array]) -> Array:
        """The weight that consists of these matrices."""
        (weight,) = matrices
        return weight

    def loaded(self, tensor: str, stored: Any) -> Array:
        """A weight from the array that `stored` made of it."""
        return jnp.asarray(stored)

    def stored(self, tensor: str, weight: Array) -> Any:
        """A weight as it is handed out, in its own layout."""
        return np.asarray(weight)

    def in_memory(self) -> Self:
        """The same runner, which leaves nothing on disk."""
        return self

    def trainable_stage(self, index: int, state: State) -> "TrainableStage":
        """The stage as a function, its inputs and its targets, for a refinement."""
        raise RecipeError("refine is for models with a forward pass of prox24's own")


class TrainableStage(NamedTuple):
    """A stage that is trained.

    Attributes:
      apply: the stage; the same object for equal stages, which are then compiled once.
      names: the tensors' names, by those that `apply` has for them.
      inputs: micro-batches of the pruned model.
      targets: the dense stage's outputs for the dense model's inputs.
      micro_batches: of a step.
    """

    apply: Apply
    names: Mapping[str, str]
    inputs: Sequence[Any]
    targets: Sequence[Any]
    micro_batches: int


def check_found(tensors: Collection[str], recipe: Recipe) -> None:
    """Raises RecipeError where an expression of a recipe is found in no linear's name."""
    given = [("only", recipe.only), ("skip", recipe.skip)]
    given += [("pattern", expression) for expression in recipe.expressions]
    for field, expression in given:
        if expression and not any(re.search(expression, tensor) for tensor in tensors):
            raise RecipeError(
                f"{field} {expression!r} is found in none of the {len(tensors)} linears; their "
                f"names are {_kinds(tensors)}"
            )
    if not any(recipe.pattern_of(tensor) for tensor in tensors):
        raise RecipeError(
            f"the recipe prunes none of the {len(tensors)} linears; their names are "
            f"{_kinds(tensors)}"
        )


def _kinds(tensors: Collection[str]) -> str:
    """Names with a star for the number of a layer; the first ten of them."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor) for tensor in tensors))
    return ", ".join(kinds[:10]) + ", and others" * (len(kinds) > 10)


def check_widths(widths: Mapping[str, int], recipe: Recipe) -> None:
    """Raises CheckpointError where M does not divide the input width of a tensor that is pruned."""
    for tensor, width in widths.items():
        pattern = recipe.pattern_of(tensor)
        block = 1 if pattern is None else pattern.width
        if width % block:
            raise CheckpointError(
                f"tensor {tensor} has input width {width}, not divisible by {block}: "
                f"the pattern {pattern} does not fit"
            )
