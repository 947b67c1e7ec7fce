"""Tiny models with planted massive activations, a store of its own for every test, and the real default model
for marked tests.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from again import float64_refinements
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import families, loading
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.specs import ModelSpec

CHANNELS, HEADS, KV_HEADS, HEAD_SIZE, INNER, LAYERS, CONTEXT = 64, 4, 2, 16, 96, 2, 128
MASSIVE = {3: 400.0, 17: -250.0}
"""Channel: value added to the newline's embedding, which makes that token massive by every rule."""
OUTLIER_CHANNEL, OUTLIER = 5, 6.0
"""A channel that is large for every token, as in a real model: without it the 4-bit error of ordinary rows
would be small too.
"""
TEXT = "\n".join(f"{i} sheep and {i * 7 % 13} goats went over hill {i % 5};" for i in range(300))

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, no merges, no special tokens added: any text, 256 ids."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_model(
    family: str = "llama",
    *,
    tied: bool = False,
    plant: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    context: int = CONTEXT,
) -> LoadedModel:
    """A random two-layer model of a family, gains and biases away from 1 and 0 so that forgetting one shows;
    newlines are massive if planted.
    """
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, vocab_size=256, hidden_size=CHANNELS, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_SIZE, max_position_embeddings=context, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            if "embed_tokens" in name:
                parameter.mul_(25).add_(0.05)  # standard deviation 0.5, mean not 0: centring it would show
                parameter[:, OUTLIER_CHANNEL] += OUTLIER
                if plant:
                    for channel, value in MASSIVE.items():
                        parameter[tokenizer("\n").input_ids[0], channel] += value
    model.requires_grad_(False)
    return LoadedModel(
        model,
        tokenizer,
        families.roles_of(FAMILIES[family]),
        ModelSpec(source=f"tiny {family}"),
        f"tiny-{family}-{seed}",
        "random",
    )


def save_tiny(folder: Path, family: str = "llama", **options) -> ModelSpec:
    """A tiny model saved as a folder, and the spec that loads it."""
    loaded = tiny_model(family, **options)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return ModelSpec(source=str(folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The two longest files first: else one core waits while the other still runs notebooks."""
    longest = ("test_notebooks.py", "test_browser.py")
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a file's tests stay on one worker, but of the notebooks every second two: those
    that ask for the same rows, 06 and 07, would only wait for each other."""
    from xdist.scheduler import LoadFileScheduling

    class Halves(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            notebook = re.search(r"test_notebooks\.py.*\[(\d\d)-", nodeid)
            return super()._split_scope(nodeid) + (f" {int(notebook[1]) // 2 % 2}" if notebook else "")

    return Halves(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that tests know are the CPU's; tests/test_device.py compares a GPU's with them."""
    monkeypatch.setenv(loading.DEVICE, "cpu")


@pytest.fixture(autouse=True)
def no_open_figures() -> Iterator[None]:
    """A figure that a test leaves open is not the one the next test draws on."""
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def few_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny tensors, where a second one only waits; the marked tests on the default model keep
    all.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.node.get_closest_marker("model") else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Refinements whose R can be compared with that of a second run."""
    with float64_refinements():
        yield


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def tiny_spec(tmp_path: Path) -> ModelSpec:
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of about 13,000 bytes whose halves differ; a newline, the massive token, every few words."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def default_store() -> Store:
    """The user's own store, so that the default model is fetched and converted once, not once a run."""
    return Store()


@pytest.fixture
def default_model(default_store: Store) -> LoadedModel:
    """The default model, freshly loaded (well under a second once converted), since surgery changes it."""
    return loading.load_model(ModelSpec(), default_store)


@pytest.fixture(scope="session")
def wikitext2() -> None:
    """Skips where WikiText-2's raw files are not at hand."""
    folder = Path(os.environ.get("DFROT_LAB_DATA", "nowhere"))
    if not any((folder / part / "wiki.valid.raw").exists() for part in ("", "wikitext2")):
        pytest.skip("DFROT_LAB_DATA names no folder with WikiText-2's raw files")
