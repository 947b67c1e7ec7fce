"""What transformers makes of a model's folder: config, model, tokenizer. No code of the folder runs, no one
is asked whether it may, and what cannot be made is a ValueError of one line."""

import json
import tempfile
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Writer
from dfrot_lab.model import files, packed
from dfrot_lab.model.checkpoint import check, check_shape, places_of, quiet
from dfrot_lab.model.families import CAUSAL, attention, oddity, roles_of
from dfrot_lab.recipe.base import require


def config_of(folder: Path, source: str) -> Any:
    """The transformers config in a folder, the model's name being `source`. ValueError: it cannot be used, or
    its family cannot be rotated."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    said = files.read_object(file := folder / "config.json")
    kind, names = said.get("model_type"), said.get("architectures") or [""]
    known = "a model_type of transformers: code that a model brings along is never run here"
    is_known = isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES
    require(f"model_type in {file}", repr(kind)[:40], is_known, known)
    is_list = isinstance(names, list) and isinstance(names[0], str) and f"_{names[0]}".isidentifier()
    require(f"architectures in {file}", repr(names)[:40], is_list, "a list of classes' names")
    if told := said.get("quantization_config"):
        packed.bits_of(source, told)
    files.check_pointer(file, "configuration_files", file.name)
    files.check_numbers(file, said)
    with files.explained(f"the config in {folder} cannot be used", files.AGAIN), quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, attn_implementation="eager")
    if told:
        del config.quantization_config  # its weights are made plain ones before they are loaded
    config.fusion_config = None  # it would replace parts of the model
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    causal = class_name(config)
    is_named = names[0] in ("", causal)
    require(f"architectures in {file}", names[0], is_named, f"{causal}, as its model_type, {kind}, is")
    roles_of(causal)
    files.check_config(file, config)
    if why := oddity(config):
        raise ValueError(f"this {causal} cannot be rotated here without changing it: {why}")
    return config


def keep_words(writer: Writer, config: Any, tokenizer: Any) -> None:
    """Put a config and a tokenizer into an artefact that is a model's folder."""
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch, save_jinja_files=False)
        for made in Path(scratch).glob("*.json"):
            said = json.loads(made.read_text(encoding="utf-8"))
            if own := said.get("added_tokens"):  # transformers adds <|endoftext|>, be there a row or not
                said["added_tokens"] = [each for each in own if each["id"] < config.vocab_size]
            writer.save_json(made.stem, said)


def class_name(config: Any) -> str:
    """The class that transformers takes for a causal model of this config, or what the config names."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    said = str((config.architectures or [causal or type(config).__name__])[0])
    return causal if causal and said.endswith(CAUSAL) else said


def model_of(config: Any, dtype: str, folder: Path, *, keeps: bool) -> Any:
    """The model of a config with the weights in its folder, which must be exactly its own; where it `keeps`
    none its parameters are on `meta`, and there is nothing in them. ValueError."""
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    options = {"dtype": getattr(torch, dtype), "experts_implementation": "eager"}

    @files.explained(f"no model can be made of the config and the weights in {folder}", files.AGAIN)
    def empty() -> Any:
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, attn_implementation=attention(config), **options
        )

    with torch.device("meta"):  # nothing is allocated before the parameters are those in the weights
        places_of(folder, empty(), roles_of(class_name(config)))
    if not keeps:
        with init_empty_weights(include_buffers=False):
            return empty()
    fault = files.explained(f"no model can be made of the config and the weights in {folder}", files.AGAIN)
    with fault, quiet():
        model, found = getattr(transformers, class_name(config)).from_pretrained(
            None, config=config, state_dict=_tensors(folder), output_loading_info=True,
            trust_remote_code=False, attn_implementation=attention(config), ignore_mismatched_sizes=True,
            **options,
        )  # fmt: skip
    for name, shape, wanted in found["mismatched_keys"]:
        check_shape(folder, name, shape, wanted)
    check(folder, found["missing_keys"], found["unexpected_keys"])
    return model


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder's weight files, mapped: what is read of them is read when it is used."""
    from safetensors import safe_open

    found = dict[str, Tensor]()
    for path in files.weights_of(folder):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
    return found


@cache
def tokenizer_of(folder: str, rows: int, _bytes: str) -> Any:
    """The tokenizer of a model with these bytes, its ids below `rows`; loaded once, so that a text is
    tokenised once. ValueError: also where a token that was added to it has a larger id, or ids are drawn."""
    from transformers import AutoTokenizer

    files.check_pointer(Path(folder) / "tokenizer_config.json", "fast_tokenizer_files", "tokenizer.json")
    with files.explained(f"no tokenizer can be loaded from {folder}", "Put its own, whole files there."):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        defaults = {each.default for each in signature(type(tokenizer).__init__).parameters.values()}
        known = tokenizer.get_vocab().items()  # a class adds its default tokens, be there a row or not
        ids = {f"of {token!r:.60}": number for token, number in known if token not in defaults}
        ids |= {"put around a text": max(tokenizer("a").input_ids, default=0)}
        token, largest = max(ids.items(), key=lambda item: item[1])
    rule = f"below vocab_size = {rows}, the rows of its embedding"
    require(f"the largest id of the tokenizer in {folder}", f"{largest} {token}", largest < rows, rule)
    for name, drawn in chances(tokenizer).items():
        require(f"{name} of the tokenizer in {folder}", drawn, not drawn, "0 or null: else ids are drawn")
    return tokenizer


def chances(tokenizer: Any) -> dict[str, Any]:
    """What of a tokenizer has it draw other ids for the same text at every call, by the files' names."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    sentencepiece = getattr(tokenizer, "sp_model_kwargs", None) or {}
    sampling = sentencepiece.get("enable_sampling")
    return {"model.dropout": getattr(model, "dropout", None), "sp_model_kwargs.enable_sampling": sampling}
