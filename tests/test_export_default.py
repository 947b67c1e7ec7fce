"""The default model taken away in every format, and found the same by who loads it: plain transformers, real
llama.cpp.
"""

import pytest
import torch
from test_export import apart
from test_gguf_export import by_llama_cpp, file_of, header
from torch import Tensor
from transformers import AutoModelForCausalLM

import dfrot_lab
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import compressed, gguf, hf, llama_cpp
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, Recipe, RotationSpec, recipe_of
from dfrot_lab.score import build, perplexity

pytestmark = pytest.mark.model

TEXT = "The capital of France is Paris, and that of Italy is"
DIGITS = "In 2024 it's 3,141 km; the sheep's 1st hill\n\n  was   not THERE."
WINDOW = 256
ROWS = ["RH", "Offset+"]


def recipe_for(row: str) -> Recipe:
    """W4A16 by rounding to nearest; Offset+ after a few steps, on a few rows: it is a rotation all the same."""
    text = CorpusSpec(name="wikipedia-sample", split="calibration")
    rotation = registry.spec_of(row, capture=CaptureSpec(corpus=text, tokens=128))
    rotation = rotation.with_(**({"updates": 5} if row == "Offset+" else {}))
    of = {"rotation": rotation, "corpus": CorpusSpec(name="wikipedia-sample"), "windows": 1, "window": WINDOW}
    return recipe_of("4-16-16", weights="rtn", **of)


@pytest.fixture(scope="module", params=ROWS)
def rotated(request, default_store: Store, tmp_path_factory):
    """A plain folder of the rotated model, and a recipe that rotates it no further."""
    recipe = recipe_for(request.param)
    folder = hf.export(recipe, tmp_path_factory.mktemp("of") / "rotated", default_store)
    yield folder, recipe.with_(model=ModelSpec(source=str(folder)), rotation=RotationSpec(kind="NR"))


@pytest.fixture
def ids(default_model: LoadedModel) -> Tensor:
    return torch.tensor([default_model.tokenizer(TEXT)["input_ids"]])


@torch.inference_mode()
def logits(model, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_a_plain_folder_has_the_originals_logits(rotated, ids, default_model):
    model = AutoModelForCausalLM.from_pretrained(rotated[0], dtype=torch.float32).eval()
    assert apart(logits(model, ids), logits(default_model.model, ids)) < 2e-5


def in_llama_cpp(recipe: Recipe, kind: str, ids: Tensor, original, store: Store, tmp_path):
    """The header of a file, and the log-probabilities of what follows 2 to 12 tokens: llama.cpp's, the
    original's."""
    prompts = [ids[0, :length].tolist() for length in range(2, ids.shape[1] + 1, 3)]
    wanted = torch.stack([logits(original, torch.tensor([p]))[0, -1].log_softmax(-1) for p in prompts])
    file = file_of(gguf.export(recipe, tmp_path / kind, store, kind=kind))
    found = by_llama_cpp(file, prompts, wanted.shape[1])
    assert not found.isnan().any()
    said = header(file) | {"tokens": counted(file, DIGITS)}
    file.unlink()
    return said, found, wanted


def counted(file, text: str) -> int:
    """How many tokens llama.cpp makes of a text."""
    answer = llama_cpp.server(file).handle_completions({"prompt": text, "n_predict": 1})
    return int(answer["usage"]["prompt_tokens"])


def test_in_llama_cpp_it_has_the_originals_probabilities(
    rotated, ids, default_model, default_store, tmp_path
):
    said, found, wanted = in_llama_cpp(rotated[1], "F32", ids, default_model.model, default_store, tmp_path)
    assert float((found - wanted)[wanted > -12].abs().max()) < 1e-3
    assert said["tokenizer.ggml.pre"] == "gpt-2", "made here, of a folder: its vocabulary merges no digits"
    assert said["tokens"] == len(default_model.tokenizer(DIGITS)["input_ids"])


def test_in_blocks_of_8_bits_it_is_within_two_hundredths_of_a_nat(
    ids, default_model, default_store, tmp_path
):
    """Out of the packaged file, whose header is taken along."""
    of = recipe_for("RH"), "Q8_0"
    said, found, wanted = in_llama_cpp(*of, ids, default_model.model, default_store, tmp_path)
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 0.02
    assert said["tokenizer.ggml.pre"] == "smollm"
    assert said["tokens"] == len(default_model.tokenizer(DIGITS)["input_ids"])
    assert "tokenizer.chat_template" in said and len(said["tokenizer.ggml.tokens"]) == wanted.shape[1]


def test_quantized_it_is_what_was_scored(rotated, ids, default_store: Store, tmp_path):
    """To the bit of its scales, its perplexity by a plain loop, and again as a model of the lab."""
    recipe = rotated[1]
    folder = compressed.export(recipe, tmp_path / "made", default_store)
    built = build.build(recipe, default_store)
    model = dfrot_lab.load_export(folder)
    assert apart(logits(model, ids), logits(built.loaded.model, ids)) < 1e-6
    [window] = build.windows(recipe, built.loaded)
    with torch.inference_mode():
        loss = float(model(window[None], labels=window[None]).loss)
    assert perplexity.evaluate(recipe, default_store).losses.mean() == pytest.approx(loss, rel=1e-5)
    again = recipe.with_(model=ModelSpec(source=str(folder)))
    again = again.with_(weights=again.weights.with_(quantizer=again.weights.quantizer.with_(bits=16)))
    assert perplexity.evaluate(again, default_store).losses.mean() == pytest.approx(loss, rel=1e-5)
