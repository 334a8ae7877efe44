"""A model that runs segment by segment, and stops before each group of weights to prune.

Its jaxpr, with all calls inlined, is cut into segments. For every batch, a segment starts from kept
values and computes the inputs of the next group. Equal segments, as in equal layers, share one
program.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Literal

from prox24._pruning.grams import Sums, empty_gram
from prox24._trees.calibrate import (
    InputGram,
    Survey,
    add_products,
    check_same,
    found_grams,
    survey_products,
)
from prox24._trees.products import Apply, is_array, opened
from prox24._trees.rules import bind
from prox24.errors import CalibrationError
from prox24.optax._leaves import PyTree, named_leaves

Values = list[dict[Any, Array]]
"""For each batch the values of variables; the parameters are variables too."""


class Segment(NamedTuple):
    """Equations that compute the inputs of a group's weights from kept values.

    `rows` holds these inputs by path. The start or an earlier segment makes the variables in
    `reads`. Later segments read the variables in `writes`.
    """

    equations: list[Any]
    reads: list[Any]
    writes: list[Any]
    rows: list[tuple[str, Any]]

    def run(self, given: Sequence[Array]) -> tuple[list[Array], list[tuple[str, Array]]]:
        """The values of `writes`, and the inputs of the weights."""
        values = dict(zip(self.reads, given, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in self.equations:
            results = bind(equation, [read(atom) for atom in equation.invars])
            values |= zip(equation.outvars, results, strict=True)
        return list(map(read, self.writes)), [(path, read(atom)) for path, atom in self.rows]


class Cut(NamedTuple):
    """A model cut into segments.

    Attributes:
      segments: one for each group, which ends before the group.
      last: for each variable, the last segment that reads it.
      weights: the variables of the parameters, by path.
      batch: the variables of a batch.
      constants: the values of the jaxpr's constants, by variable.
    """

    segments: list[Segment]
    last: dict[Any, int]
    weights: dict[str, Any]
    batch: list[Any]
    constants: dict[Any, Array]


def cut(survey: Survey, paths: Collection[str], groups: list[list[str]]) -> Cut:
    """Cuts a model before each group of weights; `paths` are the paths of its arrays.

    A segment computes the inputs of its group from values of earlier segments. It does not write
    values that depend on weights of its own or a later group. The second input of a weight used
    twice is such a value.
    """
    jaxpr, constants = opened(survey.jaxpr)
    # A write to a reference has no output that a later segment would need.
    if any(hasattr(var.aval, "inner_aval") for each in jaxpr.eqns for var in each.outvars):
        raise CalibrationError('the model has a jax.Ref: prune it in the order "one-shot"')
    weights, batch = dict(zip(paths, jaxpr.invars, strict=False)), jaxpr.invars[len(paths) :]
    group_of = {path: index for index, group in enumerate(groups) for path in group}
    # The last group that a variable depends on.
    level = {var: group_of.get(path, -1) for path, var in weights.items()}
    for equation in jaxpr.eqns:
        highest = max((level.get(var, -1) for var in _variables(equation.invars)), default=-1)
        level |= dict.fromkeys(equation.outvars, highest)
    segments, last, remaining = list[Segment](), dict[Any, int](), list(jaxpr.eqns)
    for index, group in enumerate(groups):
        outputs = zip(survey.products, jaxpr.outvars, strict=True)
        rows = [(path, var) for path, var in outputs if path in group]
        # A dict, for the same order in equal segments.
        needed = dict.fromkeys(_variables([var for _, var in rows]))
        equations = list[Any]()
        for equation in reversed(remaining):
            if not needed.keys().isdisjoint(equation.outvars):
                equations.insert(0, equation)
                needed |= dict.fromkeys(_variables(equation.invars))
        made = dict.fromkeys(var for equation in equations for var in equation.outvars)
        reads = [var for var in needed if var not in made]
        writes = [var for var in made if level[var] < index]
        last |= dict.fromkeys(reads, index)
        segments.append(Segment(equations, reads, writes, rows))
        remaining = [own for own in remaining if set(writes).isdisjoint(own.outvars)]
    for index, segment in enumerate(segments):
        writes = [var for var in segment.writes if last.get(var, -1) > index]
        segments[index] = segment._replace(writes=writes)
    return Cut(segments, last, weights, batch, dict(zip(jaxpr.constvars, constants, strict=True)))


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


class Walk:
    """Runs a model over batches, one segment after the other.

    `first` is the survey of the first batch. `start` is the stream of the dense model before the
    first segment.
    """

    def __init__(
        self,
        apply: Apply,
        params: PyTree,
        batches: Iterable[PyTree],
        groups: list[list[str]],
        first: Survey,
    ):
        self._groups, self._first = groups, first
        self._programs = dict[Any, Callable[..., Any]]()
        arrays = {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)}
        known, self._cuts, self.start = dict[Any, Cut](), list[Cut](), Values()
        for batch in batches:
            leaves, structure = jax.tree.flatten(batch)
            shapes = structure, tuple(map(jax.typeof, leaves))
            if shapes not in known:
                survey = survey_products(apply, params, batch) if known else first
                check_same(first, survey.layouts, survey.left_out)
                known[shapes] = cut(survey, arrays, groups)
            own = known[shapes]
            variables = [*own.weights.values(), *own.batch]
            given = dict(zip(variables, [*arrays.values(), *leaves], strict=True))
            self._cuts.append(own)
            self.start.append(own.constants | given)

    def replaced(self, stream: Values, weights: Mapping[str, Array]) -> Values:
        """The stream with other weights for the segments that follow."""
        return [
            values | {own.weights[path]: weight for path, weight in weights.items()}
            for own, values in zip(self._cuts, stream, strict=True)
        ]

    def step(
        self, index: int, streams: list[Values], wanted: Collection[str]
    ) -> tuple[dict[str, InputGram], list[Values]]:
        """Runs a segment; returns the Grams of its weights, and the streams after it.

        A second stream is the dense model's. It adds the cross-Grams.
        """
        names = [path for path in self._groups[index] if path in wanted]
        shapes = {number: self._first.shapes[path] for number, path in enumerate(names)}
        grams = {key: empty_gram(width, first=(own,)) for key, (own, width) in shapes.items()}
        crosses = jax.tree.map(jnp.copy, grams) if len(streams) > 1 else {}
        programs: dict[int, Callable[..., Any]] = {}
        behind: list[Values] = [[] for _ in streams]
        for place, own in enumerate(self._cuts):
            segment = own.segments[index]
            given = [[stream[place][var] for var in segment.reads] for stream in streams]
            if id(own) not in programs:
                programs[id(own)] = self._program(segment, names, given, grams, crosses)
            written, grams, crosses = programs[id(own)](given, grams, crosses)
            for old, new, results in zip(streams, behind, written, strict=True):
                values = old[place] | dict(zip(segment.writes, results, strict=True))
                new.append({var: x for var, x in values.items() if own.last.get(var, -1) > index})
        by_path = [{names[key]: own for key, own in sums.items()} for sums in (grams, crosses)]
        return found_grams(by_path[0], by_path[1], self._first.layouts), behind

    def _program(self, segment: Segment, names: list[str], *arguments: Any) -> Callable[..., Any]:
        """The compiled program of a segment; it has no weight names, so equal segments share it."""
        unpaired = {key for key, path in enumerate(names) if path in self._first.unpaired}

        def run(given: list[list[Array]], grams: Sums, crosses: Sums) -> Any:
            written, found = zip(*map(segment.run, given), strict=True)
            rows = [[(names.index(path), x) for path, x in own if path in names] for own in found]
            return written, *add_products(rows[0], rows[-1], grams, crosses, unpaired)

        program = jax.jit(run, donate_argnames=("grams", "crosses"))
        # The text of a jaxpr cannot be the key: it omits the arrays that inner calls hold.
        text = program.lower(*arguments).as_text()
        # It does not say what a callback calls. With this option of JAX it omits all arrays.
        if "callback" in text or jax.config.values.get("jax_use_simplified_jaxpr_constants"):
            return program
        return self._programs.setdefault((jax.tree.structure(arguments), text), program)
