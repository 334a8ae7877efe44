"""HF's PyTorch models as functions of JAX, by torchax, for models without a native forward pass.

torch and torchax are imported when a function of this module is called. The rest of prox24 does not
need them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import Checkpoint, open_checkpoint
from prox24._jobs.forward import all_linears, batch_size
from prox24._jobs.perplexity import from_losses, sequence_loss
from prox24._trees.products import Apply
from prox24.errors import CheckpointError, Prox24Error, UnsupportedModelError, first_line

if TYPE_CHECKING:
    import torch


class TorchModel(NamedTuple):
    """A PyTorch module as a function of its parameters, by name, and a batch.

    A tied parameter has one entry. The result is the module's first output.
    """

    apply: Apply
    params: dict[str, Array]


class Call(NamedTuple):
    """The further arguments of a module's call, after its first argument."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


def require() -> tuple[Any, Any]:
    """The modules torch and torchax; raises Prox24Error if one is missing or they do not fit."""
    try:
        import torch
        import torchax
    except ImportError as error:
        raise Prox24Error(
            f"{error.name or first_line(error)} is not installed: pip install 'prox24[torchax]'"
        ) from error
    except AttributeError as error:  # torchax 0.0.13 raises this error with torch 2.13
        raise Prox24Error(
            f"torchax does not work with torch {torch.__version__} ({first_line(error)}): "
            "pip install --upgrade 'prox24[torchax]'"
        ) from error
    return torch, torchax


def open_any(path: str | Path) -> Checkpoint:
    """Opens a model. If its `decoder` is None, there is no forward pass here: torchax runs it."""
    try:
        return open_checkpoint(path)
    except UnsupportedModelError as error:
        if Path(path).suffix == ".gguf":
            raise
        try:
            require()
        except Prox24Error as missing:
            raise UnsupportedModelError(f"{error}; for torchax to run it: {missing}") from error
        return open_checkpoint(path, any_family=True)


def from_torch(model: "torch.nn.Module") -> TorchModel:
    """An HF model as a function of JAX, for `prox24.calibrate` and `prune_params`.

    Args:
      model: an HF model in evaluation mode; it is not changed.

    Returns:
      `apply` and `params`. `apply(params, tokens)` takes tokens of shape (batch, length). It
      returns the logits of a language model, or the last hidden states of an encoder. All matrix
      products have the highest precision. `params` are copies of the parameters in their dtypes.

    Raises:
      Prox24Error: torch or torchax is missing, or their releases do not fit. `apply` raises
        `UnsupportedModelError` if torchax cannot run the model.
    """
    return TorchLayer(model).function()


class TorchLayer(NamedTuple):
    """A module, such as a decoder layer, the prefix of its tensors' names, and its call."""

    module: Any
    prefix: str = ""
    call: Call = Call((), {})

    def axes(self) -> dict[str, int]:
        """The weights of its linears, each with the axis of its sum."""
        torch, _ = require()
        from transformers.pytorch_utils import Conv1D

        return {
            f"{self.prefix}{name}.weight": axis
            for name, module in self.module.named_modules()
            for kind, axis in {torch.nn.Linear: 1, Conv1D: 0}.items()
            if isinstance(module, kind)
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its parameters, by name."""
        named = self.module.named_parameters()
        return {self.prefix + name: tuple(values.shape) for name, values in named}

    def function(self) -> TorchModel:
        """The module as a function of its parameters, named with the prefix, and a batch."""
        torch, torchax = require()
        module, prefix = self.module, self.prefix
        environment = torchax.default_env()
        params, buffers, rest = environment.t2j_copy(
            (
                {prefix + name: values.detach() for name, values in module.named_parameters()},
                dict(module.named_buffers()),
                self.call,
            )
        )

        def apply(params: dict[str, Array], batch: Array) -> Array:
            own = {name.removeprefix(prefix): values for name, values in params.items()}
            with environment, jax.default_matmul_precision("highest"):
                state, first, others = environment.j2t_iso((own | buffers, batch, rest))
                arguments = (first, *others.arguments)
                with _unsupported(f"torchax cannot run {type(module).__name__}"):
                    output = torch.func.functional_call(module, state, arguments, others.keywords)
                return environment.t2j_iso(
                    output if isinstance(output, torch.Tensor) else output[0]
                )

        return TorchModel(apply, params)


def linear_axes(checkpoint: Checkpoint) -> dict[str, int]:
    """The weights of all linears to prune, each with the axis of its sum."""
    if checkpoint.decoder is not None:
        axis = 0 if checkpoint.decoder.names.transposed else 1
        return {linear.tensor: axis for linear in all_linears(checkpoint.decoder)}
    _, layers = _decoder_layers(checkpoint)
    axes = {name: axis for layer in layers for name, axis in layer.axes().items()}
    if not axes:
        raise UnsupportedModelError(f"{checkpoint.path}: the decoder layers have no linears")
    return axes


def torch_perplexity(
    checkpoint: Checkpoint,
    windows: NDArray[np.int32],
    on_step: Callable[[int], None] = lambda index: None,
) -> float:
    """`native_perplexity` for any HF decoder: the whole model is in memory, and runs by window."""
    apply, params = loaded(checkpoint)

    @jax.jit
    def loss(params: dict[str, Array], tokens: Array) -> Array:
        return sequence_loss(apply(params, tokens[None])[0], tokens)

    losses: list[float] = []
    for index, window in enumerate(windows):
        losses.append(float(loss(params, jnp.asarray(window))))
        on_step(index)
    return from_losses(checkpoint.path, windows, np.array(losses))


def loaded(checkpoint: Checkpoint) -> TorchModel:
    """A whole model as a function of JAX."""
    return from_torch(_load(checkpoint.path))


def _load(path: Path) -> "torch.nn.Module":
    torch, _ = require()
    from transformers import AutoModelForCausalLM

    with _unsupported(f"{path}: transformers cannot load it"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if loading["missing_keys"]:  # transformers fills them with random values
        raise CheckpointError(f"{path}: tensor {min(loading['missing_keys'])} is missing")
    return model.eval()


@contextlib.contextmanager
def _unsupported(said: str) -> Iterator[None]:
    """Turns the many errors of other packages into UnsupportedModelError.

    A lack of memory raises MemoryError: it is no fault of the model, and may not occur again.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's message
            raise MemoryError(first_line(error)) from error
        raise UnsupportedModelError(f"{said}: {first_line(error)}") from error


def _decoder_layers(checkpoint: Checkpoint) -> tuple[Any, list[TorchLayer]]:
    """The model, and its layers without their calls; checks that the files have all linears."""
    torch, _ = require()
    model: Any = _load(checkpoint.path)
    count = getattr(model.config, "num_hidden_layers", None)
    lists = (
        [TorchLayer(layer, f"{name}.{index}.") for index, layer in enumerate(module)]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    )
    layers = next(lists, None)
    if layers is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of {count} layers")
    for tensor in (tensor for layer in layers for tensor in layer.axes()):
        if tensor not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: tensor {tensor} is not in the files")
    return model, layers


def layers_and_inputs(
    checkpoint: Checkpoint, windows: NDArray[np.int32]
) -> tuple[list[TorchLayer], list[Array]]:
    """The layers of a decoder with their calls, and the first layer's input, batch by batch."""
    torch, torchax = require()
    model, layers = _decoder_layers(checkpoint)
    kind, size = type(model).__name__, batch_size(*windows.shape)
    first_inputs: list[Array] = []
    calls: list[Call] = []
    for start in range(0, len(windows), size):
        tokens = torch.as_tensor(windows[start : start + size], dtype=torch.long)
        seen: list[tuple[Any, Call]] = []

        def note(module: Any, arguments: Any, keywords: Any, seen: Any = seen) -> None:
            keywords = dict(keywords)
            first, *rest = arguments or (keywords.pop("hidden_states"),)
            seen.append((first, Call(tuple(rest), keywords)))

        with contextlib.ExitStack() as hooks:
            for layer in layers:
                hook = layer.module.register_forward_pre_hook(note, with_kwargs=True)
                hooks.callback(hook.remove)
            with _unsupported(f"{kind} does not run"), torch.no_grad():
                model(tokens, use_cache=False)
        if len(seen) != len(layers):
            raise UnsupportedModelError(
                f"{kind} does not call each of its {len(layers)} layers once"
            )
        first_inputs.append(torchax.default_env().t2j_copy(seen[0][0]))
        found = [call for _, call in seen]
        if calls and not _equal(calls, found):
            raise UnsupportedModelError(
                f"the layers of {kind} depend on more than their hidden states"
            )
        calls = calls or found
    own = [layer._replace(call=call) for layer, call in zip(layers, calls, strict=True)]
    return own, first_inputs


def _equal(a: list[Call], b: list[Call]) -> bool:
    torch, _ = require()
    values, others = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(values) == len(others) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(values, others, strict=True)
    )
