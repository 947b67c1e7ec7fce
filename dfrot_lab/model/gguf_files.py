"""A GGUF file, or the parts of a split one, as a folder of float32 weights: exactly the values it holds. What
cannot be kept of it is refused by name, before any weight is dequantised."""

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import MANIFEST, Store, Writer
from dfrot_lab.disk.atomic import Changed, digest
from dfrot_lab.model import gguf_config
from dfrot_lab.model.checkpoint import check_finite
from dfrot_lab.model.families import attention
from dfrot_lab.model.files import AGAIN, INDEX, explained
from dfrot_lab.model.folder import keep_words
from dfrot_lab.recipe.base import content_key, require

log = logging.getLogger(__name__)

VERSION = 3  # of what is made of a file: raise it when the same file becomes something else
SHARD = 2 << 30  # bytes of weights after which another file of the folder is begun
LONG = 4096  # values of one key: no such list, as of tokens, says anything of the model
VALUES = 1 << 20  # values in all lists of a header: 200,000 tokens with their kinds and merges are 600,000
COUNT = 1 << 16  # keys of a file, or tensors
PART = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.gguf)", re.IGNORECASE)
ADDS_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "tekken")
"""Pre-tokenizers with which llama.cpp begins a text with BOS, where the file does not say whether to."""


class _Reader(gguf.GGUFReader):
    """gguf's reader, for which a file that ends too early is an EOFError."""

    listed = 0  # values in all lists of the header so far

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise EOFError(f"it has {len(self.data):,} bytes, and byte {end:,} was to be read")
        return super()._get(offset, dtype, count, override_order)

    def _build_fields(self, offs: int, count: int) -> int:
        counts = {"keys": int(count), "tensors": int(self.fields["GGUF.tensor_count"].parts[0][0])}
        for name, number in counts.items():
            require(f"the number of its {name}", f"{number:,}", number <= COUNT, f"at most {COUNT:,}")
        return int(super()._build_fields(offs, count))

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """ValueError: lists so long, all together, that to read them takes minutes, before one is read."""
        if raw_type == gguf.GGUFValueType.ARRAY:
            self.listed += int(self._get(orig_offs + 4, np.uint64)[0])
            rule = f"at most {VALUES:,}"
            require("the number of values in its lists", f"{self.listed:,}", self.listed <= VALUES, rule)
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        """ValueError: tensors that do not begin where an aligned file has them, or that share bytes."""
        for field in fields:
            start, step = int(field.parts[-1][0]), int(self.alignment)
            self._get(int(start_offs) + start, np.uint8, 0)  # before an offset near 2^64 wraps
            require(f"the offset of {field.name}", start, start % step == 0, f"a multiple of {step}")
        super()._build_tensors(start_offs, fields)
        check_apart({each.name: (int(each.data_offset), int(each.data.nbytes)) for each in self.tensors})


def check_apart(places: Mapping[str, tuple[int, int]]) -> None:
    """Refuse tensors, by name the first byte and how many, of which two share one."""
    for (name, (first, size)), (other, (start, _)) in pairwise(sorted(places.items(), key=lambda x: x[1])):
        end = first + size
        require(f"the first byte of {other}", start, start >= end, f"at least {end}, where {name} ends")


@dataclass(frozen=True)
class Header:
    """What a GGUF file at `path` says under its keys, its tensors by name, the transformers config, and what
    the model calls a tensor."""

    path: Path
    said: dict[str, Any]
    tensors: dict[str, Any]
    config: Any
    targets: dict[str, str]

    @property
    def kinds(self) -> str:
        """The kinds of its quantized tensors, such as Q4_1/Q8_0."""
        return "/".join(sorted({x.tensor_type.name for x in self.tensors.values()} - {"F32"})) or "F32"


def is_gguf(path: Path) -> bool:
    """Whether this is the name of a GGUF file that is there."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def parts(path: Path) -> list[Path]:
    """The files of the model that `path` is, or is a part of: `name-00001-of-00003.gguf`. ValueError."""
    if not (named := PART.fullmatch(path.name)):
        return [path]
    name, count, ending = named.groups()
    files = [path.with_name(f"{name}-{n:05d}-of-{count}{ending}") for n in range(1, int(count) + 1)]
    if path not in files:
        raise ValueError(
            f"{path} must be one of parts 1 to {int(count)}, as its name says how many there are"
        )
    if lost := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{path} is one of {int(count)} parts of a model: put {lost[0]} beside it")
    return files


def key_of(path: Path) -> str:
    """The content key of a file with all its parts, and of what is made of it."""
    return content_key([VERSION, *[digest(part) for part in parts(path)]])


def read(path: Path) -> Header:
    """The header of a file with all its parts; no weight is read. ValueError: why it cannot be loaded."""
    readers = [_reader(part) for part in parts(path)]
    fields = readers[0].fields.items()
    with explained(f"the header of {path} is damaged", AGAIN):
        said = {name: field.contents() for name, field in fields if len(field.data) < LONG}
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    try:
        if (count := said.get("split.count", 1)) != len(readers):
            named = f"model-00001-of-{count:05d}.gguf"
            raise ValueError(f"is one of {count} parts of a model: name them as llama.cpp does, {named}")
        config = gguf_config.config_of(said, tensors)
        if tokens := readers[0].fields.get("tokenizer.ggml.tokens"):
            rows, count = config.vocab_size, len(tokens.data)
            rule = f"as many as token_embd.weight has rows, {rows}"
            require("the tokens in its header", count, count == rows, rule)
        for tensor in {x.tensor_type: x for x in tensors.values()}.values():
            _check_kind(tensor)
        targets = _targets(config, tensors)
    except Exception as error:
        why = "" if isinstance(error, ValueError) else f"is damaged: {type(error).__name__} "
        raise ValueError(f"{path} {why}{' '.join(str(error).split())}") from error
    return Header(path, said, tensors, config, targets)


def fields(path: Path) -> dict[str, Any]:
    """The keys of a file's header, as gguf reads them, long lists among them."""
    return dict(_reader(parts(path)[0]).fields)


def _reader(path: Path) -> _Reader:
    """A file's reader; a ValueError if it is no GGUF file, or ends before what its header announces."""
    with path.open("rb") as file:
        if (start := file.read(4)) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it begins with {start!r}, not with b'GGUF'")
    try:
        reader = _Reader(path)
    except EOFError as error:
        raise ValueError(f"{path} is truncated: {error}. Copy or download it again.") from error
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged, or newer than the package gguf: {said}") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise ValueError(f"{path} is big-endian, which is not read here: convert it with gguf-convert-endian")
    return reader


def _check_kind(tensor: Any) -> None:
    """Dequantise the first row, to see whether it can be done."""
    try:
        gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError:
        kind = f"{tensor.tensor_type.name} ({tensor.name})"
        raise ValueError(
            f"holds weights of the kind {kind}, which cannot be read: take another kind"
        ) from None


def _targets(config: Any, tensors: dict[str, Any]) -> dict[str, str]:
    """The model's name of every tensor of the file. ValueError: one that is missing, strange, misshapen."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, attn_implementation=attention(config)
        )
    arch = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if name not in tied}
    targets = {str(names.get_name(name, (".weight", ".bias"))): name for name in shapes}
    divisors = {name for pair in gguf_config.DIVISORS for name in pair}
    if lost := targets.keys() - tensors.keys():
        raise ValueError(f"lacks {len(lost)} tensors of a {config.model_type} model, the first {min(lost)}")
    if strange := tensors.keys() - targets.keys() - divisors:
        place = f"that a {config.model_type} model has no place for, the first {min(strange)}"
        raise ValueError(f"holds {len(strange)} tensors {place}")
    for name, target in targets.items():
        if (shape := tuple(map(int, reversed(tensors[name].shape)))) != shapes[target]:
            raise ValueError(f"holds {name} of the shape {shape}, and its header makes it {shapes[target]}")
    return targets


def _weight(header: Header, name: str) -> Tensor:
    """A tensor's values in float32; in a llama file the rows of q and k are interleaved, for another RoPE."""
    stored = header.tensors[name]
    values = np.array(gguf.dequantize(stored.data, stored.tensor_type), dtype=np.float32)
    if header.config.model_type == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        pairs = values.reshape(-1, header.config.head_dim // 2, 2, values.shape[-1])
        values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    check_finite(str(header.path), [(name, torch.from_numpy(values))])
    return torch.from_numpy(values)


def _shards(header: Header) -> Iterator[tuple[str, list[str]]]:
    """The tensors in the file's order, as many together as SHARD holds; of each lot the name to save as."""
    sizes = {
        name: 4 * int(header.tensors[name].n_elements) for name in header.tensors if name in header.targets
    }
    lots, filled = [list[str]()], 0
    for name, size in sizes.items():
        if filled and filled + size > SHARD:
            lots, filled = [*lots, []], 0
        lots[-1].append(name)
        filled += size
    return ((f"model-{number:05d}", lot) for number, lot in enumerate(lots, 1))


def folder(find: Callable[[], Path], key: str, key_now: Callable[[], str], store: Store) -> tuple[Path, str]:
    """The file with this key, which `find` looks for if it has to be read, as a folder of float32 weights in
    the store, made once, and words that say what it is. Changed: `key_now` is another one afterwards."""

    def convert(writer: Writer) -> None:
        path = find()
        header = read(path)
        tokenizer = _tokenizer(header)
        log.info("dequantising %s to float32, once", path.name)
        places = dict[str, str]()
        for file, lot in _shards(header):
            if not writer.has(file):
                writer.save_tensors(file, {header.targets[name]: _weight(header, name) for name in lot})
            places |= {header.targets[name]: f"{file}.safetensors" for name in lot}
        writer.save_json(Path(INDEX).stem, {"metadata": {}, "weight_map": places})
        keep_words(writer, header.config, tokenizer)
        writer.note["provenance"] = f"dequantised {header.kinds} of {path.name}"
        if key_now() != key:
            raise Changed(f"{path} was changed while it was read: run the same command again")

    artefact = store.get_or_make("model", {"gguf": key}, convert)
    if strange := {file.name for file in artefact.path.iterdir()} - {*artefact.manifest["files"], MANIFEST}:
        raise ValueError(f"{artefact.path} holds {min(strange)}, which was not written there: take it away")
    return artefact.path, str(artefact.manifest["note"]["provenance"])


def _tokenizer(header: Header) -> Any:
    """The tokenizer that the file describes, with BOS or a space before a text where llama.cpp has one."""
    from tokenizers.pre_tokenizers import Metaspace
    from transformers import AutoTokenizer

    first, what = parts(header.path)[0], f"{header.path} describes a tokenizer that cannot be made"
    with tempfile.TemporaryDirectory() as alone, explained(what, AGAIN):
        (Path(alone) / first.name).symlink_to(
            first.resolve()
        )  # a tokenizer's files beside it are not its own
        tokenizer: Any = AutoTokenizer.from_pretrained(alone, gguf_file=first.name, trust_remote_code=False)
    if header.said.get("tokenizer.ggml.pre") in ADDS_BOS:
        tokenizer.add_bos_token = header.said.get("tokenizer.ggml.add_bos_token", True)
    inner = tokenizer.backend_tokenizer
    if header.said.get("tokenizer.ggml.add_space_prefix") is False and isinstance(
        inner.pre_tokenizer, Metaspace
    ):
        inner.pre_tokenizer = Metaspace(prepend_scheme="never", split=False)
    return tokenizer
