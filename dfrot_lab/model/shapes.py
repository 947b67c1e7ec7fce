"""The sizes of a model, known without reading its weights: what its cost is counted from."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.disk.atomic import digest
from dfrot_lab.model import gguf_files, loading
from dfrot_lab.model.families import heads_of
from dfrot_lab.recipe.specs import DEFAULT_MODEL, SECOND_MODEL, ModelSpec

PASS = 4  # bytes of one pass over one float32 value


@dataclass(frozen=True)
class Shape:
    """A LLaMA-like model: channels C, layers, MLP width, (key-value) heads, head size, vocabulary, tied; the
    `room`, bytes, that its weights of `item` bytes may fill: one that does not fit is read layer by layer.
    Of each layer's MLPs (`experts`) a token passes `active`; one that all share counts by its width."""

    channels: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool = False
    room: float = math.inf
    experts: float = 1
    active: float = 1
    item: int = PASS

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of one layer's q, k, v, o, and of one MLP's gate, up, down."""
        C, q, kv = self.channels, self.heads * self.head, self.kv_heads * self.head
        return (q, C), (kv, C), (kv, C), (C, q), (self.mlp, C), (self.mlp, C), (C, self.mlp)

    @property
    def inputs(self) -> tuple[int, int, int, int]:
        """Channels of the four inputs of one layer's linears: of q, k, v; of o; of gate, up; of down."""
        return self.channels, self.heads * self.head, self.channels, self.mlp

    @property
    def linear_weights(self) -> int:
        """Weights of the linears of all layers."""
        return int(self.total(lambda out, into: out * into, self.experts))

    def total(self, value: Callable[[int, int], float], mlps: float) -> float:
        """The sum of a value of (out, in) over all layers' linears, `mlps` MLPs a layer."""
        each = [value(out, into) for out, into in self.linears]
        return self.layers * (sum(each[:4]) + mlps * sum(each[4:]))

    @property
    def active_weights(self) -> float:
        """Weights of the linears that a token passes."""
        return self.total(lambda out, into: out * into, self.active)

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and again of lm_head."""
        return self.vocabulary * self.channels

    @property
    def parameters(self) -> int:
        """Parameters as published, lm_head counted unless tied; biases and norms of heads (Qwen) left out."""
        gains = (2 * self.layers + 1) * self.channels
        return self.linear_weights + gains + self.embedding * (1 if self.tied else 2)

    @property
    def model_bytes(self) -> float:
        """Memory of the weights once lm_head is untied."""
        return self.item * replace(self, tied=False).parameters

    @property
    def layers_held(self) -> int:
        """How many layers are there at once: all, or of a model that does not fit one."""
        return self.layers if self.model_bytes <= self.room else 1

    @property
    def held_bytes(self) -> float:
        """Memory of the weights there at once: all, or of a model that does not fit the largest part."""
        part = max(self.linear_weights / self.layers, self.embedding)
        return self.model_bytes if self.model_bytes <= self.room else self.item * part


SHAPES = {
    DEFAULT_MODEL: Shape(576, 30, 1536, 9, 3, 64, 49152, tied=True),
    SECOND_MODEL: Shape(896, 24, 4864, 14, 2, 64, 151936),  # the file has an lm_head of its own
    "llama-2-7b": Shape(4096, 32, 11008, 32, 32, 128, 32000),
    "llama-3-70b": Shape(8192, 80, 28672, 64, 8, 128, 128256),
}  # models known by name: nothing of theirs has to be there to say what they would take


def shape_of(config: Any) -> Shape:
    """The shape of a transformers config of a supported architecture."""
    names = ("ffn_dim", "moe_intermediate_size", "intermediate_size")
    mlp = next(size for name in names if (size := getattr(config, name, None)))
    layers, tied = config.num_hidden_layers, bool(config.tie_word_embeddings)
    shape = Shape(config.hidden_size, layers, mlp, *heads_of(config), config.vocab_size, tied)
    if not (experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)):
        return shape
    shared = getattr(config, "shared_expert_intermediate_size", 0) / mlp
    return replace(shape, experts=experts + shared, active=config.num_experts_per_tok + shared)


def shape(source: ModelSpec) -> Shape:
    """The shape of a name in `SHAPES`, a config in a folder or at the hub, a .gguf file; ValueError."""
    found = SHAPES.get(source.source) or _shape(source)
    dtype = source.dtype if source.dtype != "auto" else "float32"
    if source.dtype == "auto" and source.source not in SHAPES:
        dtype = loading.placed(source).dtype
    return replace(found, item=getattr(torch, dtype).itemsize)


def _shape(source: ModelSpec) -> Shape:
    path = Path(source.source).expanduser()
    if gguf_files.is_gguf(path):
        return shape_of(gguf_files.read(path).config)
    if (file := path / "config.json").is_file():  # kept, since reading it loads transformers

        def make(writer: Writer) -> None:
            writer.save_json("shape", asdict(shape_of(loading.config_of(path, source))))

        with suppress(OSError):  # a cache that cannot be written keeps nothing
            return Shape(**Store().get_or_make("shape", {"config": digest(file)}, make).json("shape"))
    try:
        place = loading.resolve(source)[1]
    except ValueError as error:
        raise ValueError(f"{error} To estimate without a model: {', '.join(SHAPES)}.") from None
    return shape_of(loading.config_of(place, source))
