"""A model that stops at each group of weights to be pruned, and goes on from there.

Its jaxpr, with all calls inlined, is cut into segments. Each goes on from the values that were kept
of every batch to the inputs of the next group. Equal segments, as those of equal layers, are one
program.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.extend.core import Literal

from prox24._pruning.grams import Sums
from prox24._trees.calibrate import (
    InputGram,
    Survey,
    add_products,
    empty_grams,
    found_grams,
    survey_products,
)
from prox24._trees.products import Apply, bind, is_array, split_arrays
from prox24.optax._leaves import PyTree, named_leaves

Values = dict[Any, Array]
"""By variable of a jaxpr."""


class Segment(NamedTuple):
    """Equations between kept values and the inputs of a group's weights.

    Attributes:
      equations: in their order.
      reads: the variables that none of these equations makes.
      writes: the variables that later segments read, and that no later pruning changes.
      rows: the inputs of the group's weights, by path.
    """

    equations: list[Any]
    reads: list[Any]
    writes: list[Any]
    rows: list[tuple[str, Any]]

    def run(self, given: Sequence[Array]) -> tuple[list[Array], list[tuple[str, Array]]]:
        """What is to be kept, and the inputs of the weights."""
        values = dict(zip(self.reads, given, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in self.equations:
            results = bind(equation, [read(atom) for atom in equation.invars])
            values |= zip(equation.outvars, results, strict=True)
        return list(map(read, self.writes)), [(path, read(atom)) for path, atom in self.rows]


class Cut(NamedTuple):
    """The segments of a model for batches of one shape.

    Attributes:
      segments: one for each group.
      last: by variable, the last segment that reads it.
      arrays: the variables of the parameters.
      batch: those of a batch.
      constants: the values of the others.
    """

    segments: list[Segment]
    last: dict[Any, int]
    arrays: list[Any]
    batch: list[Any]
    constants: Values

    def read(self, reads: list[Any], arrays: list[Array], values: Values) -> list[Array]:
        """The values of variables."""
        known = dict(zip(self.arrays, arrays, strict=True)) | self.constants | values
        return [known[var] for var in reads]


def cut(survey: Survey, paths: Sequence[str], groups: Sequence[Sequence[str]]) -> Cut:
    """Cuts a model, whose arrays have these paths, at groups of weights.

    A segment has what the inputs need and no segment before it has kept. It does not keep what
    depends on weights of its group or a later one, as the second input of a weight used twice.
    """
    # JAX 0.12 has one class for both, earlier ones have two.
    jaxpr = getattr(survey.jaxpr, "jaxpr", survey.jaxpr)
    constants = dict(zip(jaxpr.constvars, getattr(survey.jaxpr, "consts", ()), strict=True))
    arrays, batch = jaxpr.invars[: len(paths)], jaxpr.invars[len(paths) :]
    group_of = {path: index for index, group in enumerate(groups) for path in group}
    # The last group that a variable depends on, and the number of the equation that makes it.
    level = {var: group_of.get(path, -1) for var, path in zip(arrays, paths, strict=True)}
    maker: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        highest = max((level.get(var, -1) for var in _variables(equation.invars)), default=-1)
        level |= dict.fromkeys(equation.outvars, highest)
        maker |= dict.fromkeys(equation.outvars, number)
    segments, last = [], dict[Any, int]()
    for index, group in enumerate(groups):
        products = zip(survey.products, jaxpr.outvars, strict=True)
        rows = [(path, var) for path, var in products if path in group]
        inputs = _variables(var for _, var in rows)
        own, unseen = set[int](), list(inputs)
        while unseen:
            number = maker.get(unseen.pop())
            if number is not None and number not in own:
                own.add(number)
                unseen += _variables(jaxpr.eqns[number].invars)
        equations = [jaxpr.eqns[number] for number in sorted(own)]
        made = [var for equation in equations for var in equation.outvars]
        used = [var for equation in equations for var in _variables(equation.invars)]
        reads = dict.fromkeys([*used, *inputs])
        for var in made:
            reads.pop(var, None)
        last |= dict.fromkeys(reads, index)
        writes = [var for var in made if level[var] < index]
        for var in writes:
            del maker[var]  # Later segments read it.
        segments.append(Segment(equations, list(reads), writes, rows))
    for index, segment in enumerate(segments):
        read_later = [var for var in segment.writes if last.get(var, -1) > index]
        segments[index] = segment._replace(writes=read_later)
    return Cut(segments, last, arrays, batch, constants)


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


class Stream(NamedTuple):
    """The arrays of a model, and the values that it has kept of every batch."""

    arrays: list[Array]
    values: list[Values]


class Walk:
    """A model over batches, one segment after the other."""

    def __init__(
        self,
        apply: Apply,
        params: PyTree,
        batches: Sequence[PyTree],
        groups: Sequence[Sequence[str]],
        first: Survey,
    ):
        self._groups, self._first = groups, first
        self._programs = dict[Any, Callable[..., Any]]()
        self._paths = [path for path, leaf in named_leaves(params) if is_array(leaf)]
        cuts: dict[Any, Cut] = {}
        self._cuts, values = list[Cut](), list[Values]()
        for batch in batches:
            leaves, structure = jax.tree.flatten(batch)
            shapes = structure, tuple(map(jax.typeof, leaves))
            if shapes not in cuts:
                survey = survey_products(apply, params, batch) if cuts else first
                cuts[shapes] = cut(survey, self._paths, groups)
            self._cuts.append(cuts[shapes])
            values.append(dict(zip(cuts[shapes].batch, leaves, strict=True)))
        self.start = Stream(split_arrays(params)[0], values)

    def replaced(self, stream: Stream, weights: Mapping[str, Array]) -> Stream:
        """The stream of a model that goes on with other weights, in the dtypes of its own."""
        arrays = [
            weights[path].astype(array.dtype) if path in weights else array
            for path, array in zip(self._paths, stream.arrays, strict=True)
        ]
        return stream._replace(arrays=arrays)

    def step(
        self, index: int, streams: Sequence[Stream], wanted: Collection[str]
    ) -> tuple[dict[str, InputGram], list[Stream]]:
        """Runs a segment; returns the Grams of its weights, and the streams behind it.

        A second stream is the dense model's, for cross-Grams.
        """
        names = [path for path in self._groups[index] if path in wanted]
        shapes = {number: self._first.shapes[path] for number, path in enumerate(names)}
        grams, crosses = ({key: empty_grams(shape) for key, shape in shapes.items()} for _ in "12")
        if len(streams) == 1:
            crosses = {}
        programs: dict[int, Callable[..., Any]] = {}
        behind: list[list[Values]] = [[] for _ in streams]
        for place, own in enumerate(self._cuts):
            segment = own.segments[index]
            given = [own.read(segment.reads, arrays, values[place]) for arrays, values in streams]
            if id(own) not in programs:
                programs[id(own)] = self._program(segment, names, given, grams, crosses)
            written, grams, crosses = programs[id(own)](given, grams, crosses)
            for saved, (_, values), new in zip(behind, streams, written, strict=True):
                kept = values[place] | dict(zip(segment.writes, new, strict=True))
                saved.append({var: value for var, value in kept.items() if own.last[var] > index})
        sums = (
            {path: own[key] for key, path in enumerate(names) if own} for own in (grams, crosses)
        )
        found = found_grams(*sums, self._first.layouts)
        return found, [
            Stream(each.arrays, saved) for each, saved in zip(streams, behind, strict=True)
        ]

    def _program(self, segment: Segment, names: list[str], *arguments: Any) -> Callable[..., Any]:
        """The segment's; equal ones share it, since nothing in it tells names of weights."""

        def run(given: list[list[Array]], grams: Sums, crosses: Sums) -> Any:
            written, rows = zip(*map(segment.run, given), strict=True)
            pruned, *dense = (
                [(names.index(path), each) for path, each in own if path in names] for own in rows
            )
            return written, *add_products(pruned, *dense or [pruned], grams, crosses)

        program = jax.jit(run, donate_argnames=("grams", "crosses"))
        # The text of a jaxpr is no key: it leaves out arrays that calls within it hold.
        key = jax.tree.structure(arguments), program.lower(*arguments).as_text()
        return self._programs.setdefault(key, program)
