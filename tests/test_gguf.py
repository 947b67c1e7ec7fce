"""A GGUF file is loaded as exactly what it holds, or refused by name before any weight is dequantised."""

import logging
import math
import re
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import FAMILIES, byte_tokenizer, tiny_model
from gguf import GGMLQuantizationType as Kind
from gguf_writer import HALVES, to_interleaved, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import checkpoint, corpus, gguf_files, shapes, stream
from dfrot_lab.model.checkpoint import HEAD
from dfrot_lab.model.families import roles_of
from dfrot_lab.model.loading import LoadedModel, fingerprint, load_model, resolve
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
FILES: dict[str, Kind | dict[str, Kind]] = {
    **{name: Kind[name] for name in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "IQ4_NL", "IQ4_XS")},
    "Q4_K_M": {"token_embd.weight": Kind.Q6_K, "ffn_down.weight": Kind.Q6_K, "attn_v.weight": Kind.Q6_K, "": Kind.Q4_K},
    "Q5_K_M": {"token_embd.weight": Kind.Q6_K, "ffn_down.weight": Kind.Q6_K, "attn_v.weight": Kind.Q6_K, "": Kind.Q5_K},
    "Q2_K": {"ffn_down.weight": Kind.Q3_K, "": Kind.Q2_K},
}  # fmt: skip
"""What is called so is in which kind by tensor, as llama.cpp's quantizer mixes them."""
CONTEXT = 64


def model_of(kind: str = "llama", **changes: Any) -> LoadedModel:
    """A random model of an architecture, gains and biases away from 1 and 0."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3).add_(
                0.3 * torch.randn_like(parameter) * ("norm" in name or name.endswith("bias"))
            )
    model.requires_grad_(False)
    roles = roles_of(type(model).__name__)
    return LoadedModel(model, byte_tokenizer(), roles, ModelSpec(source="random"), "random", "random")


def spec_of(path: Path) -> ModelSpec:
    return ModelSpec(source=str(path))


def assert_the_same_function(found: LoadedModel, wanted: LoadedModel) -> None:
    """Logits of whole windows, positions to the end of the context; a forgotten scaling changes 1% and more."""
    ids = torch.randint(0, 256, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    logits, target = found.model(ids).logits, wanted.model(ids).logits
    assert float((logits - target).abs().max() / target.abs().max()) < 1e-5
    assert found.model(ids[:, :8]).logits.isfinite().all()


@pytest.mark.parametrize("name", FILES)
def test_every_kind_has_the_values_of_gguf_s_own_dequantisation(name: str, tmp_path: Path, store: Store):
    """K and IQ kinds are of random blocks: the package gguf reads them and cannot quantize to them."""
    write_gguf(tmp_path / "m.gguf", model_of(), kinds=FILES[name])
    loaded = load_model(spec_of(tmp_path / "m.gguf"), store)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {x.tensor_type.name for x in reader.tensors} - {"F32"} == set(
        loaded.provenance.split()[1].split("/")
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    state = {names.get_name(each, (".weight",)): x.numpy() for each, x in loaded.model.state_dict().items()}
    assert state.keys() == {x.name for x in reader.tensors}
    for stored in reader.tensors:
        values = state[stored.name]
        values = to_interleaved(values, 64) if stored.name.endswith(("_q.weight", "_k.weight")) else values
        assert values.dtype == np.float32 and np.isfinite(values).all()
        assert np.array_equal(values, gguf.dequantize(stored.data, stored.tensor_type)), stored.name


def test_the_kinds_that_are_random_blocks_are_those_that_gguf_cannot_quantize():
    for name in HALVES:
        with pytest.raises(NotImplementedError):
            gguf.quantize(np.zeros((1, 256), dtype=np.float32), Kind[name])


def test_a_kind_that_cannot_be_read_is_refused_by_its_name_and_the_file_s(tmp_path: Path, store: Store):
    write_gguf(tmp_path / "m.gguf", model_of(), tensors={"blk.0.odd": np.zeros((4, 4), dtype=np.float64)})
    rule = rf"^{re.escape(str(tmp_path))}/m\.gguf holds weights of the kind F64 \(blk\.0\.odd\), which cannot be read"
    with pytest.raises(ValueError, match=rule):
        load_model(spec_of(tmp_path / "m.gguf"), store)
    assert not store.list()


def test_a_kind_that_gguf_does_not_know_is_no_damaged_download(tmp_path: Path, store: Store):
    path = tmp_path / "m.gguf"
    write_gguf(path, model_of())
    data, name = path.read_bytes(), b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 16  # behind the number of dimensions and two of them
    path.write_bytes(data[:at] + (31).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(
        ValueError,
        match=r"m\.gguf is damaged, or newer than the package gguf: .*31\)? is not a valid GGMLQuant",
    ):
        load_model(spec_of(path), store)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"mistral"}))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_architecture_is_the_model_it_was_made_of(
    family: str, tied: bool, tmp_path: Path, store: Store
):
    original = tiny_model(family, tied=tied)
    write_gguf(tmp_path / "m.gguf", original)
    assert_the_same_function(load_model(spec_of(tmp_path / "m.gguf"), store), original)


@pytest.mark.parametrize("rotary", [1.0, 0.5])
def test_phi3_is_the_model_it_was_made_of(rotary: float, tmp_path: Path, store: Store):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": rotary}
    original = model_of("phi3", rope_parameters=rope, sliding_window=16)
    write_gguf(tmp_path / "m.gguf", original, said={"attention.sliding_window": 16})
    assert_the_same_function(load_model(spec_of(tmp_path / "m.gguf"), store), original)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("size", [32, 128])
def test_heads_of_any_size_are_those_of_the_file(family: str, size: int, tmp_path: Path, store: Store):
    original = model_of(family, head_dim=size)
    write_gguf(tmp_path / "m.gguf", original)
    assert_the_same_function(load_model(spec_of(tmp_path / "m.gguf"), store), original)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "linear, as llama.cpp takes a factor alone": ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.factor": 4.0}),
    "linear, in an old file": ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
    "none": ({"rope_type": "default"}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
         "rope.scaling.finetuned": True, "rope.scaling.yarn_ext_factor": 1.0},
    ),
    "yarn with bounds": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 0.5},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
         "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 0.5},
    ),
    "llama3": (LLAMA3, {}),
}  # fmt: skip
"""RoPE's parameters as a folder says them, and as a file does."""


def llama3_divisors(size: int, theta: float) -> np.ndarray:
    """What llama.cpp's converter writes for LLAMA3, by the formula of Llama 3.1's report, pair by pair."""
    found, old = [], LLAMA3["original_max_position_embeddings"]
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (i / size)
        smooth = (old / wavelength - 1) / (4 - 1)
        by = 1.0 if wavelength < old / 4 else 8.0 if wavelength > old else 1 / ((1 - smooth) / 8 + smooth)
        found.append(by)
    assert len({1.0, 8.0} & set(found)) == 2 and len(set(found)) > 3
    return np.array(found, dtype=np.float32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("scaling", SCALED)
def test_rope_scaling_is_that_of_the_same_model_as_a_folder(
    scaling: str, family: str, tmp_path: Path, store: Store
):
    rope, said = SCALED[scaling]
    original = model_of(family, rope_parameters={"rope_theta": 1e4, **rope})
    tensors = {"rope_freqs.weight": llama3_divisors(64, 1e4)} if scaling == "llama3" else None
    write_gguf(tmp_path / "m.gguf", original, said=said, tensors=tensors)
    original.model.save_pretrained(tmp_path / "folder")
    original.tokenizer.save_pretrained(tmp_path / "folder")
    folder = load_model(spec_of(tmp_path / "folder"), store)
    assert_the_same_function(load_model(spec_of(tmp_path / "m.gguf"), store), folder)


def test_a_forgotten_scaling_would_show(tmp_path: Path):
    """The bar of the test above: with every scaling the logits are far from those without."""
    ids = torch.randint(0, 256, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    plain = model_of().model(ids).logits
    for rope in (SCALED["linear"][0], SCALED["yarn"][0], LLAMA3):
        scaled = model_of(rope_parameters={"rope_theta": 1e4, **rope}).model(ids).logits
        assert float((scaled - plain).abs().max() / plain.abs().max()) > 1e-2


def test_longrope_of_phi3_is_that_of_the_same_model_as_a_folder(tmp_path: Path, store: Store):
    """Windows of the original context and beyond it: `assert_the_same_function` looks at both sides of 16."""
    short, long = np.linspace(1, 2, 32, dtype=np.float32), np.linspace(1, 9, 32, dtype=np.float32)
    factor = math.sqrt(1 + math.log(CONTEXT / 16) / math.log(16))
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
    }
    original = model_of("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    said = {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": factor}
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    write_gguf(tmp_path / "m.gguf", original, said=said, tensors=tensors)
    loaded = load_model(spec_of(tmp_path / "m.gguf"), store)
    assert_the_same_function(loaded, original)
    ids = torch.arange(16)[None]
    torch.testing.assert_close(loaded.model(ids).logits, original.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_scaled_file_is_read_layer_by_layer_too(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    tensors = {"rope_freqs.weight": llama3_divisors(64, 1e4)}
    write_gguf(tmp_path / "m.gguf", model_of(num_hidden_layers=2), tensors=tensors)
    ids = torch.randint(0, 256, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    wanted = load_model(spec_of(tmp_path / "m.gguf"), store).model(ids).logits
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    loaded = load_model(spec_of(tmp_path / "m.gguf"), store)
    assert loaded.checkpoint is not None
    hidden = stream.through(loaded, [ids])
    with stream.part(loaded, HEAD), torch.no_grad():
        torch.testing.assert_close(stream.logits(loaded, hidden[0]), wanted, rtol=1e-5, atol=1e-5)


ZEROS = np.zeros(256, dtype=np.float32)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], str]] = {
    "attention biases": ({}, {"blk.0.attn_q.bias": ZEROS}, r"holds 1 tensors that a llama model has no place for, the first blk\.0\.attn_q\.bias"),
    "experts": ({"expert_count": 8}, {}, r"says llama\.expert_count = 8, which would not be done"),
    "a window": ({"attention.sliding_window": 16}, {}, r"says llama\.attention\.sliding_window = 16, which would not be done"),
    "a scale": ({"attention.scale": 0.5}, {}, r"says llama\.attention\.scale = 0\.5, which would not be done"),
    "another scaling": ({"rope.scaling.type": "dynamic", "rope.scaling.factor": 4.0}, {}, r"says llama\.rope\.scaling\.type = dynamic, with factor 4\.0, which would not be done"),
    "another attention factor": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_attn_factor": 0.5}, {}, r"says llama\.rope\.scaling\.yarn_attn_factor = 0\.5"),
    "two scalings": ({"rope.scaling.factor": 4.0}, {"rope_freqs.weight": ZEROS[:32] + 1}, r"says llama\.rope\.scaling\.type = linear, with factor 4\.0"),
    "divisors of another head": ({}, {"rope_freqs.weight": ZEROS[:16] + 1}, r"holds rope_freqs\.weight of 16 values, and RoPE turns 32 pairs of channels"),
    "a partial rotation": ({"rope.dimension_count": 32}, {}, r"says llama\.rope\.dimension_count = 32, and heads of 64 would be rotated whole"),
    "values of another size": ({"attention.value_length": 32}, {}, r"says llama\.attention\.value_length = 32"),
    "layers that differ": ({"feed_forward_length": [256, 512]}, {}, r"says llama\.feed_forward_length = \[256, 512\], and every layer must have the same"),
    "another width": ({"feed_forward_length": 512}, {}, r"holds blk\.0\.ffn_\w+\.weight of the shape \(256, 256\), and its header makes it \(\d+, \d+\)"),
    "a layer too few": ({"block_count": 2}, {}, r"lacks 9 tensors of a llama model, the first blk\.1\.attn_k\.weight"),
    "long factors alone": ({}, {"rope_factors_long.weight": ZEROS[:32] + 1}, r"lacks the tensor rope_factors_short\.weight"),
    "no width": ({"embedding_length": None}, {}, r"does not say llama\.embedding_length"),
}  # fmt: skip
"""Of a llama file what is changed in its header, further tensors, and what is said to that."""


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_model_would_not_do_is_refused_before_work(
    what: str, tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
):
    said, tensors, rule = REFUSED[what]
    path = tmp_path / "m.gguf"
    write_gguf(path, model_of(), said=said, tensors=tensors)
    for look in (lambda: load_model(spec_of(path), store), lambda: shapes.shape(spec_of(path))):
        with (
            caplog.at_level(logging.INFO),
            pytest.raises(ValueError, match=rf"^{re.escape(str(path))} {rule}"),
        ):
            look()
    assert "dequantising" not in caplog.text and not store.list()


@pytest.mark.parametrize("arch", ["gemma", "gemma2", "deepseek2", "glm4", "qwen3moe", "mamba"])
def test_an_architecture_that_is_not_supported_is_said_so(
    arch: str, tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rule = (
        rf"m\.gguf holds a {arch} model, and of GGUF files only these can be read: llama, phi3, qwen2, qwen3$"
    )
    with pytest.raises(ValueError, match=rule), caplog.at_level(logging.INFO):
        load_model(spec_of(tmp_path / "m.gguf"), store)
    assert "dequantising" not in caplog.text


@pytest.mark.parametrize("size", [8, 40, 3000, 20000, -1000])
def test_a_file_cut_short_is_said_to_be_truncated(size: int, tmp_path: Path, store: Store):
    path = tmp_path / "m.gguf"
    write_gguf(path, model_of())
    data = path.read_bytes()
    path.write_bytes(data[:size])
    length = len(data[:size])
    rule = rf"^{re.escape(str(path))} is truncated: it has {length:,} bytes, and byte [\d,]+ was to be read\. Copy or"
    with pytest.raises(ValueError, match=rule):
        load_model(spec_of(path), store)
    assert not store.list()


@pytest.mark.parametrize(
    "content", [b"", b"a text, and no model", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_file_that_only_has_the_name_of_a_gguf_is_refused(content: bytes, tmp_path: Path, store: Store):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"m\.gguf is not a GGUF file: it begins with b'.*', not with b'GGUF'"
    ):
        load_model(spec_of(tmp_path / "m.gguf"), store)


PLACES: dict[str, tuple[int | None, str]] = {
    "another's place": (None, r"the first byte of \S+ must be at least \d+, where \S+ ends; got \d+"),
    "an odd place": (7, r"the offset of blk\.0\.attn_q\.weight must be a multiple of 32; got 7"),
    "behind the file": (1 << 40, r"is truncated: it has [\d,]+ bytes, and byte 1,099,511,\d+,\d+ was to be read"),
    "before the data": (2**64 - 64, r"is truncated: it has [\d,]+ bytes, and byte 18,446,744,073,\d+,\d+,\d+ was"),
}  # fmt: skip
"""An offset of one tensor in the data section, and what is said to that."""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", PLACES)
def test_tensors_lie_apart_and_in_the_data_section(what: str, tmp_path: Path, store: Store):
    place, rule = PLACES[what]
    write_gguf(path := tmp_path / "m.gguf", model_of())
    starts = {each.name: int(each.field.parts[-1][0]) for each in gguf.GGUFReader(path).tensors}
    place = starts["blk.0.attn_k.weight"] if place is None else place
    data, name = bytearray(path.read_bytes()), b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 16 + 4  # behind its dimensions and its kind
    assert int.from_bytes(data[at : at + 8], "little") == starts[name.decode()]
    data[at : at + 8] = place.to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is .*{rule.removeprefix('is ')}"):
        load_model(spec_of(path), store)
    assert not store.list()


def key(name: bytes, kind: int, *values: tuple[str, Any]) -> bytes:
    """A key of a header, as bytes."""
    said = b"".join(struct.pack(f"<{form}", value) for form, value in values)
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + said


LISTS: dict[str, tuple[int, bytes, str]] = {
    "a list of 5 million bytes": (1, key(b"x.y", 9, ("I", 0), ("Q", 5_000_000)) + bytes(5_000_000), "number of values in its lists must be at most 1,048,576; got 5,"),
    "a list of 2^40": (1, key(b"x.y", 9, ("I", 0), ("Q", 1 << 40)), "number of values in its lists must be at most 1,048,576; got 1,099"),
    "lists in a list": (1, key(b"x.y", 9, ("I", 9), ("Q", 2)) + 2 * (struct.pack("<IQ", 0, 1 << 20) + bytes(1 << 20)), "number of values in its lists must be at most 1,048,576"),
    "many keys": (70_000, b"".join(key(b"x.%d" % n, 0, ("B", 0)) for n in range(70_000)), r"number of its keys must be at most 65,536; got 70,\d+"),
}  # fmt: skip
"""Further keys of a header, how many, and what is said to that."""


@pytest.mark.parametrize("what", LISTS)
def test_a_header_that_takes_long_to_read_is_refused_before(what: str, tmp_path: Path):
    count, more, rule = LISTS[what]
    write_gguf(path := tmp_path / "m.gguf", model_of())
    data = path.read_bytes()
    keys = int.from_bytes(data[16:24], "little") + count
    path.write_bytes(data[:16] + keys.to_bytes(8, "little") + more + data[24:])
    began = time.process_time()
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is .*(the )?{rule}"):
        gguf_files.read(path)
    assert time.process_time() - began < 1


def test_the_ending_may_be_in_capitals(tmp_path: Path, store: Store):
    original = model_of()
    write_gguf(tmp_path / "m.GGUF", original)
    assert resolve(spec_of(tmp_path / "m.GGUF"))[0] == "gguf"
    assert_the_same_function(load_model(spec_of(tmp_path / "m.GGUF"), store), original)


def split_file(folder: Path, original: LoadedModel) -> list[Path]:
    write_gguf(folder / "m.gguf", original, split=4)
    return sorted(folder.glob("m-*.gguf"))


@pytest.mark.parametrize("part", [0, 1, -1])
def test_a_split_file_is_loaded_as_a_whole_by_any_of_its_parts(part: int, tmp_path: Path, store: Store):
    original = model_of()
    files = split_file(tmp_path, original)
    assert len(files) == 3 and files[0].name == "m-00001-of-00003.gguf"
    assert_the_same_function(load_model(spec_of(files[part]), store), original)
    assert len({fingerprint(spec_of(file)) for file in files}) == 1


def test_every_part_is_in_the_fingerprint(tmp_path: Path):
    files = split_file(tmp_path, model_of())
    before = fingerprint(spec_of(files[0]))
    files[-1].write_bytes(files[-1].read_bytes()[:-1] + b"\x01")
    assert fingerprint(spec_of(files[0])) != before


def test_a_part_that_is_not_there_is_named(tmp_path: Path, store: Store):
    files = split_file(tmp_path, model_of())
    files[1].unlink()
    rule = r"m-00001-of-00003\.gguf is one of 3 parts of a model: put m-00002-of-00003\.gguf beside it"
    with pytest.raises(ValueError, match=rule):
        load_model(spec_of(files[0]), store)


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf"])
def test_a_part_beyond_their_number_is_refused(name: str, tmp_path: Path, store: Store):
    odd = split_file(tmp_path, model_of())[0].rename(tmp_path / name)
    for look in (lambda: load_model(spec_of(odd), store), lambda: fingerprint(spec_of(odd))):
        with pytest.raises(ValueError, match=rf"{name} must be one of parts 1 to \d, as its name says"):
            look()


def test_a_part_under_another_name_is_no_whole_model(tmp_path: Path, store: Store):
    renamed = split_file(tmp_path, model_of())[0].rename(tmp_path / "first.gguf")
    rule = (
        r"first\.gguf is one of 3 parts of a model: name them as llama\.cpp does, model-00001-of-00003\.gguf"
    )
    with pytest.raises(ValueError, match=rule):
        load_model(spec_of(renamed), store)


@pytest.mark.parametrize(
    ("pre", "flag", "begins"),
    [(None, None, False), (None, True, True), (None, False, False), ("llama-bpe", None, True),
     ("llama-bpe", False, False), ("llama-bpe", True, True), ("qwen2", None, False)],
)  # fmt: skip
def test_a_text_begins_with_bos_where_the_file_says_so(
    pre: str | None, flag: bool | None, begins: bool, tmp_path: Path, store: Store
):
    """Without the flag llama.cpp decides by the pre-tokenizer."""
    write_gguf(tmp_path / "m.gguf", model_of(), said={"tokenizer.ggml.add_bos_token": flag}, pre=pre)
    tokenizer = load_model(spec_of(tmp_path / "m.gguf"), store).tokenizer
    plain = byte_tokenizer()("ab c\n").input_ids
    assert tokenizer("ab c\n").input_ids == [7] * begins + plain
    (tmp_path / "text.txt").write_text("ab c\n" * 40)
    ids = corpus.token_ids(CorpusSpec(name=str(tmp_path / "text.txt")), tokenizer)
    assert (int(ids[0]) == 7) == begins and 7 not in ids[1:]


def test_no_token_is_added_that_the_file_has_no_row_for(tmp_path: Path, store: Store):
    """transformers adds one to every byte-level tokenizer of a GGUF file."""
    write_gguf(tmp_path / "m.gguf", model_of())
    loaded = load_model(spec_of(tmp_path / "m.gguf"), store)
    assert max(loaded.tokenizer("a <|endoftext|> b").input_ids) < loaded.config.vocab_size
    assert loaded.tokenizer("a b").input_ids == byte_tokenizer()("a b").input_ids


@pytest.mark.parametrize("flag", [None, True, False])
def test_a_sentencepiece_text_begins_with_bos_unless_the_file_says_no(
    flag: bool | None, tmp_path: Path, store: Store
):
    """As of Llama 2: merges follow from the scores, and a text without a flag begins with BOS."""
    path, original = tmp_path / "m.gguf", model_of(vocab_size=8)
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "ab"]
    write_gguf(path, original, said={"tokenizer.ggml.add_bos_token": flag}, pieces=pieces)
    tokenizer = load_model(spec_of(path), store).tokenizer
    assert tokenizer("a b").input_ids == [1] * (flag is not False) + [6, 3, 5]


@pytest.mark.parametrize(("flag", "ids"), [(None, [6, 3, 5]), (True, [6, 3, 5]), (False, [4, 3, 5])])
def test_a_sentencepiece_text_begins_with_a_space_unless_the_file_says_no(
    flag: bool | None, ids: list[int], tmp_path: Path, store: Store
):
    """As of Phi-3."""
    path, original = tmp_path / "m.gguf", model_of(vocab_size=8)
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "ab"]
    said = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": flag}
    write_gguf(path, original, said=said, pieces=pieces)
    assert load_model(spec_of(path), store).tokenizer("a b").input_ids == ids


def test_a_big_endian_file_is_said_to_be_one(tmp_path: Path, store: Store):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"m\.gguf is big-endian, which is not read here"):
        load_model(spec_of(tmp_path / "m.gguf"), store)


def test_a_large_file_becomes_several_shards_and_a_killed_conversion_goes_on(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    original = model_of()
    write_gguf(tmp_path / "m.gguf", original)
    monkeypatch.setattr(gguf_files, "SHARD", 300_000)
    read, calls = gguf_files._weight, []

    def killed(header: gguf_files.Header, name: str) -> torch.Tensor:
        calls.append(name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return read(header, name)

    monkeypatch.setattr(gguf_files, "_weight", killed)
    with pytest.raises(KeyboardInterrupt):
        load_model(spec_of(tmp_path / "m.gguf"), store)
    first = calls.copy()
    assert_the_same_function(load_model(spec_of(tmp_path / "m.gguf"), store), original)
    assert len(calls) < len(first) + 12 and set(calls[8:]) != set(first)
    (folder,) = (artefact.path for artefact in store.list())
    assert len(list(folder.glob("model-*.safetensors"))) > 3
