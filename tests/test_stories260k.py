"""stories260K, the smallest model that speaks English, as a witness: the reader is right, and surgery keeps a
trained model's function.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import stories260k
import torch
from stories260k import Tokenizer, half_split, read_checkpoint
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.hadamard import factors
from dfrot_lab.model import surgery
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.recipe.specs import RotationSpec

FLOAT32 = 1e-5
"""Relative to the largest logit: rounding once per weight, 1e-7, through 5 layers, with room."""
STORY = "Once upon a time"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small runs faster without a pool of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder() -> Path:
    found = Path(os.environ.get("DFROT_LAB_DATA", "nowhere")) / "stories260k"
    if not (found / "stories260K.bin").exists():
        pytest.skip("DFROT_LAB_DATA names no folder with stories260k/stories260K.bin")
    return found


@pytest.fixture
def stories(folder: Path) -> LoadedModel:
    return stories260k.load(folder)


def told(loaded: LoadedModel, tokens: int = 120) -> Tensor:
    """The story (1, 1 + tokens) that the model tells greedily from BOS."""
    start = torch.tensor([[stories260k.BOS]])
    return loaded.model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )


def logits(loaded: LoadedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return loaded.model(ids).logits


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_it_tells_an_english_story(stories: LoadedModel):
    text = stories.tokenizer.decode(told(stories, 200)[0].tolist())
    assert text.startswith(STORY)
    assert len(text.split()) > 60 and all(word in text for word in (" was ", " the ", " to "))


def test_its_sizes(stories: LoadedModel):
    config = stories.model.config
    assert (stories.channels, config.intermediate_size, len(stories.layers), stories.context) == (
        64,
        172,
        5,
        512,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (8, 4, 512)
    assert surgery.is_tied(stories)
    assert factors(172) == (172, 1), (
        "R4 needs a Hadamard matrix of 172, which is no power of two times a small one"
    )


def test_without_sorting_the_rows_for_rope_it_stammers(stories: LoadedModel):
    """The reader's one subtle step shows: the same text is much less likely with q and k as they lie in the
    file.
    """
    ids = told(stories)

    def loss() -> float:
        return float(torch.nn.functional.cross_entropy(logits(stories, ids)[0, :-1], ids[0, 1:]))

    right = loss()
    for layer in stories.layers:
        for name in ("q_proj", "k_proj"):
            weight = linear(layer, f"self_attn.{name}").weight
            weight.copy_(
                weight.reshape(-1, 2, 4, 64).transpose(1, 2).reshape(weight.shape)
            )  # back to interleaved, head size 8
    assert right < 1 < loss() - right


@pytest.mark.parametrize("kind", ["RO", "RH"])
def test_surgery_keeps_its_logits_and_its_story(stories: LoadedModel, kind: str):
    ids = told(stories)
    wanted = logits(stories, ids)
    surgery.prepare(stories)
    surgery.rotate_residual(stories, rotations.make(RotationSpec(kind=kind), stories.channels))
    surgery.rotate_heads(stories)
    surgery.rotate_down(stories)
    with surgery.online(stories, r3=True, r4=True):
        assert relative(logits(stories, ids), wanted) <= FLOAT32
        assert torch.equal(told(stories), ids)
    assert relative(logits(stories, ids), wanted) > 1e-3, "without R4's online half it is another model"


def test_how_massive_its_activations_are(stories: LoadedModel):
    """Only looked at: whether a model this small has massive tokens is not known beforehand (`pytest -s`
    shows the numbers).
    """
    ids = told(stories)
    with torch.no_grad():
        hidden = torch.stack(stories.model.model(ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
    ratios = hidden.abs().amax(dim=(1, 2)) / hidden.abs().flatten(1).median(dim=1).values
    print(  # noqa: T201
        "stories260K, max / median of |residual stream| before each layer:",
        [round(ratio, 1) for ratio in ratios.tolist()],
    )
    assert ratios.shape == (5,) and ratios.isfinite().all()


def test_the_tokenizer_goes_there_and_back(folder: Path):
    tokenizer = Tokenizer(folder / "tok512.bin")
    assert len(tokenizer.pieces) == 512 and tokenizer.pieces[:3] == [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    text = "Once upon a time, there was a café.\nThe end"  # the accent has no token of its own
    ids = tokenizer(text).input_ids
    assert ids[0] == stories260k.BOS and tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 1.5, "pairs were merged"
    assert tokenizer("").input_ids == [stories260k.BOS]


# The format itself, on files made here: these run without the data


def write_tokenizer(path: Path, pieces: list[tuple[bytes, float]]) -> Path:
    path.write_bytes(
        struct.pack("<i", 9)
        + b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces)
    )
    return path


def test_the_best_scored_pair_is_merged_first(tmp_path: Path):
    special = [
        (b"<unk>", 0.0),
        (b"<s>", 0.0),
        (b"</s>", 0.0),
        *((b"<0x%02X>" % byte, 0.0) for byte in range(256)),
    ]
    letters = [(letter, -9.0) for letter in (b" ", b"a", b"b", b"c")]
    path = write_tokenizer(
        tmp_path / "tok.bin", [*special, *letters, (b"ab", -2.0), (b"bc", -1.0), (b" a", -3.0), (b"aa", -1.0)]
    )
    tokenizer = Tokenizer(path)
    assert [tokenizer.pieces[i] for i in tokenizer("abc").input_ids[1:]] == [b" a", b"bc"]
    assert [tokenizer.pieces[i] for i in tokenizer("aaa").input_ids[1:]] == [b" ", b"aa", b"a"], (
        "of equal scores the first"
    )
    assert tokenizer("é", add_special_tokens=False).input_ids == [259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer("abc é").input_ids) == "abc é"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends within a token"):
        Tokenizer(path)


def test_rows_are_sorted_head_by_head():
    rows = torch.arange(12.0)[:, None].expand(12, 3)
    assert half_split(rows, 6)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize("shared", [True, False])
def test_a_checkpoint_is_read_to_its_last_float(tmp_path: Path, shared: bool):
    dim, hidden, layers, heads, kv_heads, vocabulary, context = 8, 12, 2, 2, 1, 10, 6
    head = dim // heads
    angles = np.arange(context)[:, None] / 10000.0 ** (np.arange(0, head, 2) / head)
    weights = np.random.default_rng(0).normal(
        size=vocabulary * dim
        + layers * (2 * dim + 2 * dim * dim + 2 * kv_heads * head * dim + 3 * dim * hidden)
        + dim
    )
    floats = [weights, np.cos(angles), np.sin(angles), *([] if shared else [np.full((vocabulary, dim), 7.0)])]
    data = struct.pack(
        "<7i", dim, hidden, layers, heads, kv_heads, vocabulary if shared else -vocabulary, context
    )
    data += b"".join(part.astype(np.float32).tobytes() for part in floats)
    path = tmp_path / "tiny.bin"
    path.write_bytes(data)
    model = read_checkpoint(path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == shared
    assert shared or bool((model.lm_head.weight == 7).all())
    assert np.array_equal(
        model.model.embed_tokens.weight.numpy().ravel(), weights[: vocabulary * dim].astype(np.float32)
    )
    assert np.array_equal(model.model.norm.weight.numpy(), weights[-dim:].astype(np.float32))
    for wrong in (data[:-4], data + bytes(4), data[: 28 + 400]):
        path.write_bytes(wrong)
        wanted, got = (len(data) - 28) // 4, (len(wrong) - 28) // 4
        with pytest.raises(ValueError, match=f"tiny.bin must have {wanted} floats by its header; got {got}"):
            read_checkpoint(path)


def test_other_rope_angles_are_refused(tmp_path: Path):
    """A checkpoint trained with another base would speak nonsense under transformers' angles."""
    path = tmp_path / "tiny.bin"
    count = 4 * 8 + (2 * 8 + 4 * 64 + 3 * 64) + 8 + 2 * 6 * 4
    path.write_bytes(struct.pack("<7i", 8, 8, 1, 1, 1, 4, 6) + bytes(4 * count))
    with pytest.raises(ValueError, match="RoPE angles differ from transformers' by up to 1"):
        read_checkpoint(path)
