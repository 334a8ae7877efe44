"""The settings of a decoder's parts, and the names and shapes of its tensors.

Every family is a setting of one decoder. A layer's tensors have the names of this module, such as
"self_attn.q_proj.weight" for a linear (out, in) and "input_layernorm.weight" for a norm. `Names`
translates them to the checkpoint's names.
"""

from typing import NamedTuple


class Norm(NamedTuple):
    """x / rms(x) times (offset + weight), or the standardised x times weight plus bias."""

    kind: str  # "rms" or "layer"
    epsilon: float  # added to the mean square or the variance
    offset: float = 0.0  # 1 if the checkpoint holds weight - 1, as for Gemma


class Rope(NamedTuple):
    """Rotary positions of the first 2 len(frequencies) entries of a head, paired as in HF."""

    frequencies: tuple[float, ...]  # radians per position
    scale: float = 1.0  # of the cosines and sines
    long: tuple[float, ...] | None = None  # frequencies beyond `switch` tokens, if they differ
    switch: int = 0

    def at_length(self, length: int) -> "Rope":
        """The frequencies for a text of `length` tokens; a pass may have fewer tokens."""
        if self.long is None or length <= self.switch:
            return Rope(self.frequencies, self.scale)
        return Rope(self.long, self.scale)


class Alibi(NamedTuple):
    """Adds scale * slope_h * j to the score of a key at position j in head h."""

    slopes: tuple[float, ...]  # one for each head
    scale: float = 1.0  # applied after rounding
    dtype: str = "float32"  # of the rounded products of slopes and positions


class Attention(NamedTuple):
    """Causal attention with grouped heads.

    `fused` is None for separate q, k and v. "rows" is one linear with all queries, then all keys,
    then all values. "groups" is one linear with a group of rows for each key head: its queries, its
    key and its value. `norm` is "heads" to normalise each head of q and k, "rows" to normalise all
    heads together.
    """

    heads: int  # of the queries
    key_value_heads: int  # a divisor of `heads`
    head_dim: int
    scale: float  # of the scores
    fused: str | None = None
    bias: bool = False  # of q, k and v
    output_bias: bool = False
    norm: str | None = None
    clip: float | None = None  # bound on the magnitude of q and k, after their norm, and of v
    rope: Rope | None = None
    alibi: Alibi | None = None
    window: int | None = None  # keys that a query sees, itself included; None for all before it
    softcap: float | None = None  # c tanh(score / c) takes the place of a score


class Experts(NamedTuple):
    """A mixture: each token goes to the `per_token` experts with the largest router probability."""

    number: int
    per_token: int
    normalised: bool  # whether the probabilities of the chosen experts are divided by their sum


class MLP(NamedTuple):
    """down(act(gate(x)) up(x)), or down(act(up(x))) without a gate."""

    width: int  # between the linears
    activation: str  # a key of `prox24._models.decoder.ACTIVATIONS`
    gated: bool = True
    fused: bool = False  # one linear has the rows of gate, then the rows of up
    bias: bool = False  # of every linear
    experts: Experts | None = None  # for a mixture; the other fields describe one expert


class Residual(NamedTuple):
    """The names of the norms around the branches, and how the branches are added."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False  # both branches see the layer's input
    scale: float = 1.0  # of each branch


class Layer(NamedTuple):
    """All settings of a layer's computation; hashable. Equal layers share one program."""

    hidden: int
    norm: Norm
    attention: Attention
    mlp: MLP
    residual: Residual = Residual()


class Embedding(NamedTuple):
    """Token embedding times scale, plus learned positions, then a norm."""

    scale: float = 1.0
    positions: int = 0  # rows of the table of positions, 0 if there is none
    offset: int = 0  # the row of position 0
    norm: bool = False


class Head(NamedTuple):
    """Logits: a linear, divided, softly capped."""

    tied: bool  # the embedding serves as the linear
    bias: bool = False
    divisor: float = 1.0
    softcap: float | None = None  # c tanh(logit / c) takes the place of a logit


class Names(NamedTuple):
    """The checkpoint's names of the weights; unlisted names are equal in both.

    `layer` has pairs (name in this module, name in the checkpoint) within a layer, with "{}" for
    the number of an expert. `outer` has such pairs for tensors outside the layers.
    """

    base: str = "model."  # prefix of all but the head; a checkpoint may lack it, or its first part
    layers: str = "layers"  # before the number of a layer
    layer: tuple[tuple[str, str], ...] = ()
    outer: tuple[tuple[str, str], ...] = ()
    transposed: bool = False  # linears of layers are stored as (in, out)


class Config(NamedTuple):
    """A decoder; hashable."""

    vocabulary: int  # rows of the embedding
    hidden: int
    norm: Norm  # every norm of the model
    layers: tuple[Layer, ...]
    embedding: Embedding
    head: Head
    names: Names
    positions: int | None = None  # the most tokens of a text; None if the config does not say


def switches(config: Config) -> list[int]:
    """The lengths past which the frequencies of a `Rope` change, in increasing order."""
    ropes = (layer.attention.rope for layer in config.layers)
    return sorted({rope.switch for rope in ropes if rope is not None and rope.long is not None})


def at_length(config: Config, length: int) -> Config:
    """The decoder for texts of `length` tokens, see `Rope`; a pass may have fewer tokens."""

    def fixed(layer: Layer) -> Layer:
        rope = layer.attention.rope
        rope = None if rope is None else rope.at_length(length)
        return layer._replace(attention=layer.attention._replace(rope=rope))

    return config._replace(layers=tuple(map(fixed, config.layers)))


def linear_inputs(layer: Layer) -> dict[str, str]:
    """The linears of a layer in order of use, each with the name of its input for `tap`.

    The router of a mixture is left out: it is not pruned.
    """
    parts = ["qkv_proj"] if layer.attention.fused else ["q_proj", "k_proj", "v_proj"]
    inputs = {f"self_attn.{part}": "attention_input" for part in parts}
    inputs["self_attn.o_proj"] = "attention_output"
    entry = ["gate_proj", "up_proj"] if layer.mlp.gated else ["up_proj"]
    if layer.mlp.fused:
        entry = ["gate_up_proj"]
    experts = layer.mlp.experts
    for prefix in ["mlp"] if experts is None else expert_names(experts):
        tapped = "mlp_" if experts is None else f"{prefix}."
        inputs |= {f"{prefix}.{part}": f"{tapped}input" for part in entry}
        inputs[f"{prefix}.down_proj"] = f"{tapped}activation"
    return inputs


def expert_names(experts: Experts) -> list[str]:
    """The names of a mixture's experts within a layer."""
    return [f"mlp.experts.{index}" for index in range(experts.number)]


def layer_shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a layer; linears are (out, in)."""
    attention, mlp, hidden = layer.attention, layer.mlp, layer.hidden
    queries = attention.heads * attention.head_dim
    keys = attention.key_value_heads * attention.head_dim
    linears = {  # outputs, inputs, and whether there is a bias
        "qkv_proj": (queries + 2 * keys, hidden, attention.bias),
        "q_proj": (queries, hidden, attention.bias),
        "k_proj": (keys, hidden, attention.bias),
        "v_proj": (keys, hidden, attention.bias),
        "o_proj": (hidden, queries, attention.output_bias),
        "gate_up_proj": (2 * mlp.width, hidden, mlp.bias),
        "gate_proj": (mlp.width, hidden, mlp.bias),
        "up_proj": (mlp.width, hidden, mlp.bias),
        "down_proj": (hidden, mlp.width, mlp.bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in linear_inputs(layer):
        outputs, inputs, bias = linears[linear.rpartition(".")[2]]
        shapes[f"{linear}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{linear}.bias"] = (outputs,)
    if mlp.experts is not None:
        shapes["mlp.router.weight"] = (mlp.experts.number, hidden)
    norms = {name: hidden for name in layer.residual[:4] if name is not None}
    if attention.norm is not None:
        by_heads = attention.norm == "heads"
        norms["self_attn.q_norm"] = attention.head_dim if by_heads else queries
        norms["self_attn.k_norm"] = attention.head_dim if by_heads else keys
    for name, width in norms.items():
        shapes |= _norm_shapes(layer.norm, name, width)
    return shapes


def embedding_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `embed` reads."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocabulary, config.hidden)}
    if config.embedding.positions:
        shapes["embed_positions.weight"] = (config.embedding.positions, config.hidden)
    if config.embedding.norm:
        shapes |= _norm_shapes(config.norm, "embed_norm", config.hidden)
    return shapes


def head_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `logits` reads."""
    shapes = _norm_shapes(config.norm, "norm", config.hidden)
    shapes[head_weight(config.head)] = (config.vocabulary, config.hidden)
    if config.head.bias:
        shapes["lm_head.bias"] = (config.vocabulary,)
    return shapes


def head_weight(head: Head) -> str:
    """The name of the weight of the last linear."""
    return "embed_tokens.weight" if head.tied else "lm_head.weight"


def _norm_shapes(norm: Norm, name: str, width: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias") if norm.kind == "layer" else ("weight",)
    return {f"{name}.{part}": (width,) for part in parts}


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape, in the checkpoint's terms, of every tensor that the computation reads."""
    shapes = {
        outer_tensor(config.names, name): shape
        for name, shape in (embedding_shapes(config) | head_shapes(config)).items()
    }
    for index, layer in enumerate(config.layers):
        for name, shape in layer_shapes(layer).items():
            stored = shape[::-1] if config.names.transposed else shape
            shapes[layer_tensor(config.names, index, name)] = stored
    return shapes


def layer_tensor(names: Names, index: int, name: str) -> str:
    """The checkpoint's name of a tensor of a layer."""
    module, _, part = name.rpartition(".")
    parts = module.split(".")
    number = next((part for part in parts if part.isdecimal()), "")
    pattern = ".".join("{}" if part == number else part for part in parts)
    module = dict(names.layer).get(pattern, pattern).replace("{}", number)
    return f"{names.base}{names.layers}.{index}.{module}.{part}"


def outer_tensor(names: Names, name: str) -> str:
    """The checkpoint's name of a tensor outside the layers."""
    module, _, part = name.rpartition(".")
    base = "" if module == "lm_head" else names.base
    return f"{base}{dict(names.outer).get(module, module)}.{part}"
