"""Read llama2.c's legacy checkpoint and tokenizer, for tests on a tiny model that really speaks English:
stories260K.

Checkpoint: 7 int32 (dim, hidden, layers, heads, kv heads, vocabulary, context; the vocabulary is negative
where the classifier is not shared), then float32: embedding; then kind by kind, each for all layers:
attention norms, q, k, v, o, feed-forward norms, w1 (gate), w2 (down), w3 (up); then the last norm, the
cosines and sines of RoPE, and the classifier where it is not shared. Its RoPE pairs channels 2 i and 2 i + 1
of a head, transformers' pairs i and i + size / 2: rows of q and k are sorted for that. Tokenizer: int32
longest token, then per token float32 score, int32 length, bytes.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dfrot_lab.disk.atomic import digest
from dfrot_lab.model.families import Roles
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.specs import ModelSpec

HEADER = struct.Struct("<7i")
BOS, EOS, FIRST_BYTE = 1, 2, 3


@dataclass(frozen=True)
class Encoding:
    """What a call of the tokenizer returns."""

    input_ids: list[int]


class Tokenizer:
    """llama2.c's byte-pair encoding by score, with the few methods of a transformers tokenizer that tests
    use.
    """

    bos_token_id, eos_token_id = BOS, EOS

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        place = 4  # after the length of the longest token
        while place < len(data):
            score, size = struct.unpack_from("<fi", data, place)
            self.pieces.append(data[place + 8 : place + 8 + size])
            self.scores.append(score)
            place += 8 + size
        if place != len(data):
            raise ValueError(f"{path} ends within a token")
        self.ids = {piece: number for number, piece in enumerate(self.pieces)}

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> Encoding:
        """Ids of `text` after BOS: a space in front, characters (or their bytes), then the pair of best score
        is merged until none is left.
        """
        ids = [
            part for character in (f" {text}" if text else "") for part in self._character(character.encode())
        ]
        while pairs := [
            (self.scores[merged], -i)
            for i in range(len(ids) - 1)
            if (merged := self._merged(ids, i)) is not None
        ]:
            i = -max(pairs)[1]  # of equal scores the first pair, as in llama2.c
            ids[i : i + 2] = [self.ids[self.pieces[ids[i]] + self.pieces[ids[i + 1]]]]
        return Encoding([BOS] * add_special_tokens + ids)

    def _character(self, character: bytes) -> list[int]:
        return [self.ids[character]] if character in self.ids else [FIRST_BYTE + byte for byte in character]

    def _merged(self, ids: list[int], i: int) -> int | None:
        return self.ids.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]])

    def decode(self, ids: list[int]) -> str:
        """The text of ids: BOS and EOS are silent, and the space in front of a text is not its own."""
        parts = [
            bytes([i - FIRST_BYTE]) if FIRST_BYTE <= i < FIRST_BYTE + 256 else self.pieces[i]
            for i in ids
            if i not in (BOS, EOS)
        ]
        text = b"".join(parts).decode(errors="replace")
        return text.removeprefix(" ") if ids and ids[0] == BOS else text


def half_split(weight: Tensor, head: int) -> Tensor:
    """Rows of q or k (heads * head, channels) from interleaved RoPE to half-split: the even rows of each
    head, then its odd ones.
    """
    return weight.reshape(-1, head // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def read_checkpoint(path: Path) -> LlamaForCausalLM:
    """The model of a llama2.c checkpoint, float32; ValueError if the file is not exactly as long as its
    header says.
    """
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, context = HEADER.unpack_from(data)
    shared, vocabulary, head = vocabulary > 0, abs(vocabulary), dim // heads
    sizes = {
        "embed_tokens": (vocabulary, dim),
        "input_layernorm": (layers, dim), "self_attn.q_proj": (layers, dim, dim), "self_attn.k_proj": (layers, kv_heads * head, dim),
        "self_attn.v_proj": (layers, kv_heads * head, dim), "self_attn.o_proj": (layers, dim, dim), "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim), "mlp.down_proj": (layers, dim, hidden), "mlp.up_proj": (layers, hidden, dim),
        "norm": (dim,), "cosines": (context, head // 2), "sines": (context, head // 2),
        **({} if shared else {"lm_head": (vocabulary, dim)}),
    }  # fmt: skip
    floats = torch.from_numpy(np.frombuffer(data, np.float32, offset=HEADER.size).copy())
    counts = [int(np.prod(size)) for size in sizes.values()]
    if len(floats) != sum(counts):
        raise ValueError(f"{path} must have {sum(counts)} floats by its header; got {len(floats)}")
    tensors = {
        name: part.reshape(size)
        for (name, size), part in zip(sizes.items(), floats.split(counts), strict=True)
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        tensors[name] = torch.stack([half_split(weight, head) for weight in tensors[name]])
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=context, rms_norm_eps=1e-5, tie_word_embeddings=shared,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.load_state_dict(state_dict(tensors, layers))
    check_rope(model, tensors["cosines"])
    return model


def state_dict(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The checkpoint's tensors under transformers' names, every one of them."""
    whole = {"model.embed_tokens.weight": tensors["embed_tokens"], "model.norm.weight": tensors["norm"]}
    whole["lm_head.weight"] = tensors.get("lm_head", tensors["embed_tokens"])
    parts = [
        name for name in tensors if name.startswith(("self_attn.", "mlp.")) or name.endswith("layernorm")
    ]
    return whole | {
        f"model.layers.{i}.{name}.weight": tensors[name][i] for name in parts for i in range(layers)
    }


def check_rope(model: LlamaForCausalLM, cosines: Tensor) -> None:
    """The angles the model was trained with, which lie in the file, are the ones transformers computes."""
    positions = torch.arange(len(cosines))[None]
    ours = model.model.rotary_emb(torch.zeros(1), positions)[0][0, :, : cosines.shape[1]]
    if not torch.allclose(ours, cosines, atol=1e-4):
        raise ValueError(
            f"the file's RoPE angles differ from transformers' by up to {float((ours - cosines).abs().max()):.2g}"
        )


def load(folder: Path) -> LoadedModel:
    """stories260K from a folder with stories260K.bin and tok512.bin, ready for surgery."""
    path = folder / "stories260K.bin"
    model, tokenizer = read_checkpoint(path), Tokenizer(folder / "tok512.bin")
    return LoadedModel(
        model,
        tokenizer,
        Roles(),
        ModelSpec(source="stories260K"),
        digest(path),
        f"llama2.c checkpoint {path.name}",
    )
