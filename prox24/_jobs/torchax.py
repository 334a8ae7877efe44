"""HF's PyTorch models as functions of JAX, by torchax: what has no native forward pass.

torch and torchax are imported when a function of this module is called; the rest of prox24 does
without them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import Checkpoint, open_checkpoint
from prox24._jobs.forward import batch_size
from prox24._jobs.perplexity import from_losses, sequence_loss
from prox24._trees.products import Apply
from prox24.errors import CheckpointError, Prox24Error, UnsupportedModelError, first_line

if TYPE_CHECKING:
    import torch


class TorchModel(NamedTuple):
    """A PyTorch module as a function of its parameters, by name, and a batch.

    A tied parameter is there once. The result is the module's first output.
    """

    apply: Apply
    params: dict[str, Array]


class Call(NamedTuple):
    """What a module was called with."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


def require() -> tuple[Any, Any]:
    """The modules torch and torchax, or an error where one is missing or does not fit the other."""
    try:
        import torch
        import torchax
    except ImportError as error:
        raise Prox24Error(
            f"{error.name or first_line(error)} is not installed: pip install 'prox24[torchax]'"
        ) from error
    except AttributeError as error:  # how torchax 0.0.13 ends with torch 2.13
        raise Prox24Error(
            f"torchax does not work with torch {torch.__version__} ({first_line(error)}): "
            "pip install --upgrade 'prox24[torchax]'"
        ) from error
    return torch, torchax


def open_any(path: str | Path) -> tuple[Checkpoint, bool]:
    """Opens a model, and says whether it has a forward pass here; if not, torchax must run it."""
    try:
        return open_checkpoint(path), True
    except UnsupportedModelError as error:
        if Path(path).suffix == ".gguf":
            raise
        try:
            require()
        except Prox24Error as missing:
            raise UnsupportedModelError(f"{error}; for torchax to run it: {missing}") from error
        return open_checkpoint(path, any_family=True), False


def from_torch(model: "torch.nn.Module") -> TorchModel:
    """An HF model as a function of JAX, for `prox24.calibrate` and `prune_params`.

    Args:
      model: in evaluation mode; it is not changed.

    Returns:
      `apply(params, tokens)`, which computes the logits of a language model, or the last hidden
      states of an encoder, from tokens of shape (batch, length), with every matrix product at the
      highest precision. `params` are copies of the parameters in their dtypes.

    Raises:
      Prox24Error: torch or torchax is missing, or their releases do not go together. `apply` raises
        `UnsupportedModelError` if torchax cannot run the model.
    """
    return _as_function(model, "", Call((), {}))


def _as_function(module: "torch.nn.Module", prefix: str, call: Call) -> TorchModel:
    """The module as a function of its parameters, named with a prefix, and its first argument."""
    torch, torchax = require()
    environment = torchax.default_env()
    params, buffers, rest = environment.t2j_copy(
        (
            {prefix + name: values.detach() for name, values in module.named_parameters()},
            dict(module.named_buffers()),
            call,
        )
    )

    def apply(params: dict[str, Array], batch: Array) -> Array:
        own = {name.removeprefix(prefix): values for name, values in params.items()}
        with environment, jax.default_matmul_precision("highest"):
            state, first, others = environment.j2t_iso((own | buffers, batch, rest))
            arguments = (first, *others.arguments)
            try:
                output = torch.func.functional_call(module, state, arguments, others.keywords)
            except Exception as error:  # torchax and JAX raise a different type for each cause
                kind, reason = type(module).__name__, first_line(error)
                raise UnsupportedModelError(f"torchax cannot run {kind}: {reason}") from error
            return environment.t2j_iso(output if isinstance(output, torch.Tensor) else output[0])

    return TorchModel(apply, params)


class TorchLayer(NamedTuple):
    """A decoder layer: its module, the prefix of its tensors' names, and its call."""

    module: Any
    prefix: str
    call: Call

    def axes(self) -> dict[str, int]:
        """The weights of its linears, with the axis that each sums over."""
        torch, _ = require()
        from transformers.pytorch_utils import Conv1D

        return {
            f"{self.prefix}{name}.weight": axis
            for name, module in self.module.named_modules()
            for kind, axis in {torch.nn.Linear: 1, Conv1D: 0}.items()
            if isinstance(module, kind)
        }

    def function(self) -> TorchModel:
        """The layer as a function."""
        return _as_function(self.module, self.prefix, self.call)


def layers_and_inputs(
    checkpoint: Checkpoint, windows: NDArray[np.int32]
) -> tuple[list[TorchLayer], list[Array]]:
    """The layers of a decoder, and what enters the first one, batch by batch."""
    model, layers = _decoder_layers(checkpoint)
    size = batch_size(*windows.shape)
    batches = [windows[i : i + size] for i in range(0, len(windows), size)]
    hidden, calls = _layer_calls(model, [layer.module for layer in layers], batches)
    own = [layer._replace(call=call) for layer, call in zip(layers, calls, strict=True)]
    return own, hidden


def linear_axes(checkpoint: Checkpoint) -> dict[str, int]:
    """The weights of the linears that are pruned, with the axis that each sums over."""
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
    """`native_perplexity` of any HF decoder, all of which is in memory, window by window."""
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

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises a different type for each cause
        _raise_if_of_memory(error)
        raise UnsupportedModelError(
            f"{path}: transformers cannot load it: {first_line(error)}"
        ) from error
    if loading["missing_keys"]:  # which transformers would leave at random
        raise CheckpointError(f"{path}: tensor {min(loading['missing_keys'])} is missing")
    return model.eval()


def _raise_if_of_memory(error: Exception) -> None:
    """Raises MemoryError for what is no fault of the model, and may not come again."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's RuntimeError
        raise MemoryError(first_line(error)) from error


def _decoder_layers(checkpoint: Checkpoint) -> tuple[Any, list[TorchLayer]]:
    """The model, and its layers without their calls, all of whose linears the files have."""
    torch, _ = require()
    model: Any = _load(checkpoint.path)
    count = getattr(model.config, "num_hidden_layers", None)
    lists = (
        [TorchLayer(layer, f"{name}.{index}.", Call((), {})) for index, layer in enumerate(module)]
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


def _layer_calls(
    model: Any, layers: list[Any], batches: list[NDArray[np.int32]]
) -> tuple[list[Array], list[Call]]:
    """What enters the first layer, batch by batch, and what each is called with besides."""
    torch, torchax = require()
    first_inputs: list[Array] = []
    calls: list[Call] = []
    for batch in batches:
        seen: list[tuple[Any, Call]] = []

        def note(module: Any, arguments: Any, keywords: Any, seen: Any = seen) -> None:
            keywords = dict(keywords)
            first, *rest = arguments or (keywords.pop("hidden_states"),)
            seen.append((first, Call(tuple(rest), keywords)))

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            with torch.no_grad():
                model(torch.as_tensor(batch, dtype=torch.long), use_cache=False)
        except Exception as error:  # of the model's own code
            _raise_if_of_memory(error)
            kind, reason = type(model).__name__, first_line(error)
            raise UnsupportedModelError(f"{kind} does not run: {reason}") from error
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) != len(layers):
            raise UnsupportedModelError(
                f"{type(model).__name__} does not call each of its {len(layers)} layers once"
            )
        first_inputs.append(torchax.default_env().t2j_copy(seen[0][0]))
        found = [call for _, call in seen]
        if calls and not _equal(calls, found):
            raise UnsupportedModelError(
                f"the layers of {type(model).__name__} depend on more than their hidden states"
            )
        calls = calls or found
    return first_inputs, calls


def _equal(a: list[Call], b: list[Call]) -> bool:
    torch, _ = require()
    values, others = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(values) == len(others) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(values, others, strict=True)
    )
