"""The default model taken away in every format, and found the same by who loads it: plain transformers, real
llama.cpp.
"""

import pytest
import torch
from test_export import apart
from test_gguf_export import by_llama_cpp, file_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import dfrot_lab
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import compressed, gguf, hf
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, Recipe, recipe_of
from dfrot_lab.score import build, perplexity

pytestmark = pytest.mark.model

TEXT = "The capital of France is Paris, and that of Italy is"
WINDOW = 256


@pytest.fixture(params=["RH", "Offset+"])
def recipe(request) -> Recipe:
    """W4A16 by rounding to nearest; Offset+ after a few steps, on a few rows: it is a rotation all the same."""
    text = CorpusSpec(name="wikipedia-sample", split="calibration")
    rotation = registry.spec_of(request.param, capture=CaptureSpec(corpus=text, tokens=128))
    rotation = rotation.with_(**({"updates": 5} if request.param == "Offset+" else {}))
    of = {"rotation": rotation, "corpus": CorpusSpec(name="wikipedia-sample"), "windows": 1, "window": WINDOW}
    return recipe_of("4-16-16", weights="rtn", **of)


@pytest.fixture
def ids(default_model: LoadedModel) -> Tensor:
    return torch.tensor([default_model.tokenizer(TEXT)["input_ids"]])


@torch.inference_mode()
def logits(model, ids: Tensor) -> Tensor:
    return model(ids).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_plain_folder_has_the_originals_logits(recipe, ids, default_model, default_store: Store, tmp_path):
    folder = hf.export(recipe, tmp_path / "made", default_store)
    assert apart(logits(plain(folder), ids), logits(default_model.model, ids)) < 2e-5


def test_in_llama_cpp_it_has_the_originals_probabilities(
    recipe, ids, default_model, default_store: Store, tmp_path
):
    """In full to 1e-3, in blocks of 8 bits to 0.02 nats of divergence, after prompts of 2 to 12 tokens."""
    prompts = [ids[0, :length].tolist() for length in range(2, ids.shape[1] + 1, 3)]
    wanted = torch.stack(
        [logits(default_model.model, torch.tensor([each]))[0, -1].log_softmax(-1) for each in prompts]
    )
    for kind in ("F32", "Q8_0") if recipe.rotation.name == "RH" else ("F32",):
        file = file_of(gguf.export(recipe, tmp_path / kind, default_store, kind=kind))
        found = by_llama_cpp(file, prompts, wanted.shape[1])
        file.unlink()
        divergence = (wanted.exp() * (wanted - found)).sum(-1)
        assert float(divergence.mean()) < 0.02 and not found.isnan().any()
        likely = wanted > -12
        assert kind != "F32" or float((found - wanted)[likely].abs().max()) < 1e-3


def test_quantized_it_is_what_was_scored(recipe, ids, default_store: Store, tmp_path):
    """To the bit of its scales, its perplexity by a plain loop, and again as a model of the lab."""
    folder = compressed.export(recipe, tmp_path / "made", default_store)
    own = compressed.adapted(recipe)
    built = build.build(own, default_store)
    model = dfrot_lab.load_export(folder)
    assert apart(logits(model, ids), logits(built.loaded.model, ids)) < 1e-6
    [window] = build.windows(own, built.loaded)
    with torch.inference_mode():
        loss = float(model(window[None], labels=window[None]).loss)
    assert perplexity.evaluate(own, default_store).losses.mean() == pytest.approx(loss, rel=1e-5)
