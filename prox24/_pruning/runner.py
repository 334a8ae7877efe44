"""The protocol of a model that can be pruned: stages with weights, linears and inputs."""

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
    """A weight that can be pruned: its name, its input's name, and the width that M must divide.

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
    """The inputs x of one matrix: the Gram, sum of x x^T, and its number of tokens.

    The cross-Gram is the sum of x' x^T, where x' is the input of the same token in the dense model.
    It is None if x' = x.
    """

    gram: Array
    tokens: int
    cross: Array | None = None


class Runner(Protocol[State]):
    """A model in stages: the inputs of each stage come from the pruned stages before it.

    A stage is a layer of a decoder, or the weights of a function that share an input. A runner
    passes a `State`, such as hidden states, from one stage to the next. Only the runner reads it.
    Methods with a body serve a runner whose weights are matrices (out, in).
    """

    @property
    def stages(self) -> int:
        """The number of stages."""

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the work; None for a single one."""
        return None

    def linears(self, index: int) -> Sequence[Linear]:
        """The linears of a stage, in the order of pruning."""

    def tensors(self, index: int) -> Collection[str]:
        """The names of a stage's tensors, for a refinement."""
        return [linear.tensor for linear in self.linears(index)]

    def ties(self, index: int) -> Sequence[Sequence[Side]]:
        """The linears of a stage that may be turned together.

        Each consists of one matrix. No other linear reads their turned inputs.
        """
        return []

    def weights(self, index: int) -> dict[str, Array]:
        """The dense weights of a stage, by tensor."""

    def enter(self, dense: bool) -> tuple[int, State]:
        """The first stage to run, and the state before it; `dense` runs the dense model as well."""

    def observe(
        self, index: int, weights: Mapping[str, Array], state: State, wanted: Collection[str]
    ) -> tuple[dict[str, list[Inputs]], State]:
        """The inputs of a stage's linears; also moves the dense model, if any, to the next stage.

        The weights are dense. Each name in `wanted` gets a list with one `Inputs` for each matrix.
        """

    def advance(self, index: int, weights: Mapping[str, Array], state: State) -> State:
        """The state after a stage with these weights; `observe` has moved the dense model on."""

    def dtype(self, tensor: str) -> np.dtype[Any]:
        """The dtype of a tensor of a stage; used if the recipe has none."""

    def matrices(self, linear: Linear, weight: Array) -> list[Array]:
        """The matrices (out, in) that a weight consists of."""
        return [weight]

    def joined(self, linear: Linear, matrices: list[Array]) -> Array:
        """The weight made of its matrices; the inverse of `matrices`."""
        (weight,) = matrices
        return weight

    def loaded(self, tensor: str, stored: Any) -> Array:
        """A weight from its stored array; the inverse of `stored`."""
        return jnp.asarray(stored)

    def stored(self, tensor: str, weight: Array) -> Any:
        """A weight in its own layout, for the caller of the loop."""
        return np.asarray(weight)

    def in_memory(self) -> Self:
        """The same runner without files on disk."""
        return self

    def trainable_stage(self, index: int, state: State) -> "TrainableStage":
        """The stage as a function, its inputs and its targets, for a refinement."""
        raise RecipeError("refine is for models with a forward pass of prox24's own")


class TrainableStage(NamedTuple):
    """A stage to train.

    Attributes:
      apply: the stage as a function. Equal stages have the same object, and are compiled once.
      names: the name of each tensor, by its name in `apply`.
      inputs: micro-batches of the pruned model's inputs to the stage.
      targets: the dense stage's outputs on the dense model's inputs.
      micro_batches: number of micro-batches of a step.
    """

    apply: Apply
    names: Mapping[str, str]
    inputs: Sequence[Any]
    targets: Sequence[Any]
    micro_batches: int


def check_found(tensors: Collection[str], recipe: Recipe) -> None:
    """Raises RecipeError if an expression of a recipe matches no linear's name."""
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


def starred(tensor: str) -> str:
    """The name with a star in place of each number: `layers.*.mlp` for every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor)


def _kinds(tensors: Collection[str]) -> str:
    """The first ten different names, starred."""
    kinds = list(dict.fromkeys(map(starred, tensors)))
    return ", ".join(kinds[:10]) + ", and others" * (len(kinds) > 10)


def check_widths(widths: Mapping[str, int], recipe: Recipe) -> None:
    """Raises CheckpointError if M does not divide the input width of a tensor to prune."""
    for tensor, width in widths.items():
        pattern = recipe.pattern_of(tensor)
        block = 1 if pattern is None else pattern.width
        if width % block:
            raise CheckpointError(
                f"tensor {tensor} has input width {width}, not divisible by {block}: "
                f"the pattern {pattern} does not fit"
            )
