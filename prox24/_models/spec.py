"""What a decoder is: the settings of its parts, and the names and shapes of its tensors.

Every family is a setting of one decoder. A layer's tensors have the names of this module, whatever
the checkpoint calls them (`Names` translates): linears in (out, in) layout as
"self_attn.q_proj.weight", norms as "input_layernorm.weight".
"""

from typing import NamedTuple


class Norm(NamedTuple):
    """x / rms(x) times (offset + weight), or the standardised x times weight plus bias.

    Attributes:
      kind: "rms" or "layer".
      epsilon: added to the mean square or the variance.
      offset: 1 where the checkpoint holds weight - 1, as Gemma's do.
    """

    kind: str
    epsilon: float
    offset: float = 0.0


class Rope(NamedTuple):
    """Rotary positions of the first 2 len(frequencies) entries of a head, in HF's halves.

    Attributes:
      frequencies: radians per position.
      scale: of the cosines and sines.
      long: frequencies of sequences longer than `switch`, if they differ.
      switch: in tokens.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long: tuple[float, ...] | None = None
    switch: int = 0

    def at_length(self, length: int) -> "Rope":
        """What it is in a text of so many tokens, whatever the length of a pass."""
        if self.long is None or length <= self.switch:
            return Rope(self.frequencies, self.scale)
        return Rope(self.long, self.scale)


class Alibi(NamedTuple):
    """scale slope_h j is added to the score of a key at position j in head h.

    Attributes:
      slopes: one for each head.
      scale: applied after rounding.
      dtype: in which slopes times positions are rounded.
    """

    slopes: tuple[float, ...]
    scale: float = 1.0
    dtype: str = "float32"


class Attention(NamedTuple):
    """Causal attention with grouped heads.

    Attributes:
      heads: of the queries.
      key_value_heads: a divisor of `heads`.
      head_dim: entries of a head.
      scale: of the scores.
      fused: None for separate q, k and v; "rows" for one linear of all queries, then all keys,
        then all values; "groups" for one in which the queries of a key head are followed by its
        key and its value.
      bias: of q, k and v.
      output_bias: of the output projection.
      norm: "heads" to normalise each head of q and k, "rows" to normalise all heads together.
      clip: bound on the magnitude of q and k, after their norm, and v.
      rope: rotary positions.
      alibi: linear biases.
      window: keys that a query sees, itself included; all before it if None.
      softcap: c tanh(score / c) takes the place of a score.
    """

    heads: int
    key_value_heads: int
    head_dim: int
    scale: float
    fused: str | None = None
    bias: bool = False
    output_bias: bool = False
    norm: str | None = None
    clip: float | None = None
    rope: Rope | None = None
    alibi: Alibi | None = None
    window: int | None = None
    softcap: float | None = None


class Experts(NamedTuple):
    """A mixture: each token goes to the `per_token` experts of largest router probability.

    Attributes:
      number: of experts.
      per_token: experts that a token goes to.
      normalised: whether their probabilities are divided by their sum.
    """

    number: int
    per_token: int
    normalised: bool


class MLP(NamedTuple):
    """down(act(gate(x)) up(x)), or down(act(up(x))) without a gate.

    Attributes:
      width: between the linears.
      activation: a key of `prox24._models.decoder.ACTIVATIONS`.
      gated: whether there is a gate.
      fused: one linear whose rows are the gate's, then up's.
      bias: of every linear.
      experts: the mixture of which this is one expert.
    """

    width: int
    activation: str
    gated: bool = True
    fused: bool = False
    bias: bool = False
    experts: Experts | None = None


class Residual(NamedTuple):
    """Where the norms are, by name, and how the branches are added.

    Attributes:
      before_attention: norm of the attention's input.
      after_attention: norm of its output.
      before_mlp: norm of the MLP's input.
      after_mlp: norm of its output.
      parallel: both branches see the layer's input.
      scale: of each branch.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False
    scale: float = 1.0


class Layer(NamedTuple):
    """All that a layer's computation depends on; hashable. Equal layers share one program."""

    hidden: int
    norm: Norm
    attention: Attention
    mlp: MLP
    residual: Residual = Residual()


class Embedding(NamedTuple):
    """Token embedding times scale, plus learned positions, then a norm.

    Attributes:
      scale: of the embedding.
      positions: rows of the table of positions, 0 if there is none.
      offset: its row for position 0.
      norm: whether a norm follows.
    """

    scale: float = 1.0
    positions: int = 0
    offset: int = 0
    norm: bool = False


class Head(NamedTuple):
    """Logits: a linear over scale, softly capped.

    Attributes:
      tied: the embedding serves as the linear.
      bias: of the linear.
      divisor: of the logits.
      softcap: c tanh(logit / c) takes the place of a logit.
    """

    tied: bool
    bias: bool = False
    divisor: float = 1.0
    softcap: float | None = None


class Names(NamedTuple):
    """What a checkpoint calls the weights; what is not listed has the name it has here.

    Attributes:
      base: prefix of all but the head; some checkpoints of a family lack it, or its first part.
      layers: what comes before the number of a layer.
      layer: pairs of a name here and the checkpoint's, within a layer. "{}" is an expert's number.
      outer: the same outside the layers.
      transposed: linears of layers are stored as (in, out).
    """

    base: str = "model."
    layers: str = "layers"
    layer: tuple[tuple[str, str], ...] = ()
    outer: tuple[tuple[str, str], ...] = ()
    transposed: bool = False


class Config(NamedTuple):
    """A decoder; hashable.

    Attributes:
      vocabulary: rows of the embedding.
      hidden: width of the hidden states.
      norm: every norm of the model.
      layers: in order.
      embedding: what comes before them.
      head: what comes after them.
      names: what a checkpoint calls the weights.
      positions: the most tokens of a text; None if the config does not say.
    """

    vocabulary: int
    hidden: int
    norm: Norm
    layers: tuple[Layer, ...]
    embedding: Embedding
    head: Head
    names: Names
    positions: int | None = None


def at_length(config: Config, length: int) -> Config:
    """The decoder of texts of so many tokens, however many of them a pass has; see `Rope`."""

    def fixed(layer: Layer) -> Layer:
        rope = layer.attention.rope
        rope = None if rope is None else rope.at_length(length)
        return layer._replace(attention=layer.attention._replace(rope=rope))

    return config._replace(layers=tuple(map(fixed, config.layers)))


def linear_inputs(layer: Layer) -> dict[str, str]:
    """The linears of a layer in order of use, each with the name under which `tap` sees its input.

    The router of a mixture is not among them: it is not pruned.
    """
    parts = ["qkv_proj"] if layer.attention.fused else ["q_proj", "k_proj", "v_proj"]
    inputs = {f"self_attn.{part}": "attention_input" for part in parts}
    inputs["self_attn.o_proj"] = "attention_output"
    experts = layer.mlp.experts
    for prefix in ["mlp"] if experts is None else expert_names(experts):
        source = "mlp_input" if experts is None else f"{prefix}.input"
        activation = "mlp_activation" if experts is None else f"{prefix}.activation"
        inputs |= {f"{prefix}.{part}": source for part in _entry_linears(layer.mlp)}
        inputs[f"{prefix}.down_proj"] = activation
    return inputs


def expert_names(experts: Experts) -> list[str]:
    """The names of a mixture's experts within a layer."""
    return [f"mlp.experts.{index}" for index in range(experts.number)]


def _entry_linears(mlp: MLP) -> list[str]:
    if mlp.fused:
        return ["gate_up_proj"]
    return ["gate_proj", "up_proj"] if mlp.gated else ["up_proj"]


def layer_shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a layer; linears are (out, in)."""
    attention, mlp, hidden = layer.attention, layer.mlp, layer.hidden
    queries = attention.heads * attention.head_dim
    keys = attention.key_value_heads * attention.head_dim
    outputs = {
        "qkv_proj": (queries + 2 * keys, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_up_proj": (2 * mlp.width, hidden),
        "gate_proj": (mlp.width, hidden),
        "up_proj": (mlp.width, hidden),
        "down_proj": (hidden, mlp.width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in linear_inputs(layer):
        part = linear.rpartition(".")[2]
        shapes[f"{linear}.weight"] = outputs[part]
        output, within_attention = part == "o_proj", linear.startswith("self_attn")
        if attention.output_bias if output else (attention.bias if within_attention else mlp.bias):
            shapes[f"{linear}.bias"] = outputs[part][:1]
    if mlp.experts is not None:
        shapes["mlp.router.weight"] = (mlp.experts.number, hidden)
    for name in dict.fromkeys(layer.residual[:4]):
        if name is not None:
            shapes |= _norm_shapes(layer.norm, name, hidden)
    if attention.norm is not None:
        widths = (attention.head_dim,) * 2 if attention.norm == "heads" else (queries, keys)
        for name, width in zip(("self_attn.q_norm", "self_attn.k_norm"), widths, strict=True):
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
    table = head_weight(config.head)
    shapes[table] = (config.vocabulary, config.hidden)
    if config.head.bias:
        shapes["lm_head.bias"] = (config.vocabulary,)
    return shapes


def head_weight(head: Head) -> str:
    """The name of what the last hidden states are multiplied with."""
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
    """What the checkpoint calls a tensor of a layer.

    Example:
      >>> layer_tensor(Names(layer=(("self_attn.o_proj", "self_attn.dense"),)), 3,
      ...              "self_attn.o_proj.weight")
      'model.layers.3.self_attn.dense.weight'
    """
    module, _, part = name.rpartition(".")
    parts = module.split(".")
    number = next((part for part in parts if part.isdecimal()), "")
    pattern = ".".join("{}" if part == number else part for part in parts)
    module = dict(names.layer).get(pattern, pattern).replace("{}", number)
    return f"{names.base}{names.layers}.{index}.{module}.{part}"


def outer_tensor(names: Names, name: str) -> str:
    """What the checkpoint calls a tensor outside the layers."""
    module, _, part = name.rpartition(".")
    base = "" if module == "lm_head" else names.base
    return f"{base}{dict(names.outer).get(module, module)}.{part}"
