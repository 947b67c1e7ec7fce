"""Capture: what plain hooks see, nothing changed by looking, refused input that stores nothing, and an
artefact that stands alone.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from again import FLOAT32, apart, assert_near
from conftest import CHANNELS, CONTEXT, FAMILIES, LAYERS, MASSIVE, save_tiny, tiny_model
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import corpus, loading, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import capture as module
from dfrot_lab.observe.capture import Capture, capture, record
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec

SITES = [f"layers.{i}.{norm}" for i in range(LAYERS) for norm in ("input_norm", "post_attention_norm")]
NORMS = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}


def prepared(family: str = "llama") -> LoadedModel:
    loaded = tiny_model(family)
    surgery.prepare(loaded)
    return loaded


def some_ids(loaded: LoadedModel, blocks: int = 1, tokens: int = 50) -> Tensor:
    text = "a sheep went over the hill;\nand a goat came back\n" * 20
    return torch.tensor(loaded.tokenizer(text).input_ids[: blocks * tokens]).view(blocks, tokens)


def recorded(loaded: LoadedModel, ids: Tensor) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}
    names, residual = record(loaded, ids, lambda site, x: seen.update({site: x.clone()}))
    return names, seen, residual


def spec_of(model: ModelSpec, text: Path, tokens: int = CONTEXT) -> CaptureSpec:
    return CaptureSpec(model=model, corpus=CorpusSpec(name=str(text), split="calibration"), tokens=tokens)


# ---- what is recorded


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_record_sees_what_plain_hooks_see(family, blocks):
    loaded = prepared(family)
    ids = some_ids(loaded, blocks, 20)
    names, seen, residual = recorded(loaded, ids)
    assert names == list(seen) == SITES
    expected: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    handles = []
    for site in SITES:
        _, layer, norm = site.split(".")

        def keep(_module, args, output, site=site):
            expected[site], before[site] = output.reshape(-1, CHANNELS), args[0].reshape(-1, CHANNELS)

        handles.append(loaded.layers[int(layer)].get_submodule(NORMS[norm]).register_forward_hook(keep))
    loaded.model(ids)
    for handle in handles:
        handle.remove()
    for i, site in enumerate(SITES):
        assert_near(seen[site], expected[site])
        magnitude = before[site].abs()
        assert_near(residual["abs_max"][i], magnitude.amax(1))
        assert torch.equal(residual["channel"][i], magnitude.argmax(1))
        assert float(residual["median"][i]) == pytest.approx(float(magnitude.median()), rel=FLOAT32)


def test_the_residual_is_the_one_transformers_reports():
    """From output_hidden_states alone: hidden_states[i] enters layer i, and is what its input norm reads; x /
    rms(x) is what leaves it.
    """
    loaded = prepared()
    ids = some_ids(loaded)
    _, seen, residual = recorded(loaded, ids)
    hidden = loaded.model(ids, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        x = hidden[layer][0]
        assert_near(residual["abs_max"][2 * layer], x.abs().amax(1))
        assert float(residual["median"][2 * layer]) == pytest.approx(float(x.abs().median()), rel=FLOAT32)
        torch.testing.assert_close(
            seen[f"layers.{layer}.input_norm"],
            x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt(),
            rtol=1e-5,
            atol=1e-6,
        )


def test_newlines_are_massive_in_the_planted_channel():
    loaded = prepared()
    ids = some_ids(loaded)
    _, _, residual = recorded(loaded, ids)
    newline = ids[0] == loaded.tokenizer("\n").input_ids[0]
    assert 0 < int(newline.sum()) < len(newline)
    channel, value = max(MASSIVE.items(), key=lambda item: abs(item[1]))
    assert bool((residual["channel"][0, newline] == channel).all())
    assert bool((residual["abs_max"][0, newline] > 0.9 * value).all())
    assert bool((residual["abs_max"][0, ~newline] < 0.1 * value).all())


def test_hooks_change_nothing_and_are_gone_after():
    loaded = prepared()
    ids = some_ids(loaded)
    inside: list[Tensor] = []
    plain = loaded.model(ids).logits
    watch = loaded.layers[-1].register_forward_hook(lambda _m, _a, output: inside.append(output.clone()))
    loaded.model(ids)
    record(loaded, ids, lambda site, x: None)
    watch.remove()
    assert_near(inside[0], inside[1])
    assert_near(loaded.model(ids).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())


def test_rows_are_handed_over_one_site_at_a_time_and_hooks_go_after_an_error():
    loaded = prepared()
    seen: list[str] = []

    def fail_at_third(site: str, _x: Tensor) -> None:
        seen.append(site)
        if len(seen) == 3:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        record(loaded, some_ids(loaded), fail_at_third)
    assert seen == SITES[:3]  # the forward pass stopped there: sites are saved as they appear
    assert not any(m._forward_hooks for m in loaded.model.modules())


def test_the_median_of_many_tokens_is_close_to_the_full_one():
    x = (
        torch.randn(4096, 576, generator=torch.Generator().manual_seed(0))
        * torch.linspace(0.5, 3, 4096)[:, None]
    )
    assert x.numel() > module._MEDIAN_SAMPLE
    value, channel, some = module._extremes(x, len(x))
    assert torch.equal(value, x.abs().amax(1)) and torch.equal(channel, x.abs().argmax(1))
    assert some.numel() <= 1.5 * module._MEDIAN_SAMPLE
    assert float(some.median()) == pytest.approx(float(x.abs().median()), rel=0.02)


# ---- from spec to artefact


def test_capture_stores_what_record_sees(tiny_spec: ModelSpec, text_file: Path, store: Store):
    found = capture(spec_of(tiny_spec, text_file, 100), store)
    loaded = loading.load_model(tiny_spec)
    surgery.prepare(loaded)
    ids = corpus.token_blocks(
        CorpusSpec(name=str(text_file), split="calibration"), loaded.tokenizer, blocks=1, window=100
    )
    _, seen, residual = recorded(loaded, ids)
    assert (found.sites, found.tokens, found.channels) == (SITES, 100, CHANNELS)
    assert found.ids == ids.flatten().tolist()
    assert "".join(found.texts) == text_file.read_text()[:100]
    for site in SITES:
        assert_near(found.rows(site), seen[site])
    assert torch.equal(found.all_rows(), torch.cat([found.rows(site) for site in SITES]))
    assert_near(found.residual_max, residual["abs_max"])
    assert torch.equal(found.residual_channel, residual["channel"])
    assert_near(found.residual_median, residual["median"])
    assert found.artefact.manifest["note"]["provenance"].startswith("folder ")


def test_an_unknown_site_is_named(tiny_spec: ModelSpec, text_file: Path, store: Store):
    found = capture(spec_of(tiny_spec, text_file), store)
    said = (
        r"no site 'layers\.7\.input_norm' in this capture; it has layers\.0\.input_norm \.\. layers\.1\.post"
    )
    with pytest.raises(KeyError, match=said):
        found.rows("layers.7.input_norm")


def test_two_blocks_are_two_separate_windows(tmp_path: Path, store: Store):
    model = save_tiny(tmp_path / "long")
    config = tmp_path / "long" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 2048}))
    text = tmp_path / "long.txt"
    text.write_text("\n".join(f"line {i} of the long text" for i in range(500)))
    both = capture(spec_of(model, text, 4096), store)
    first = capture(spec_of(model, text, 2048), store)
    assert both.tokens == 4096 and both.ids[:2048] == first.ids
    for site in SITES:
        torch.testing.assert_close(both.rows(site)[:2048], first.rows(site), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"CaptureSpec\.tokens must be at most 2048 or a multiple of it; got 3000"
    ):
        capture(spec_of(model, text, 3000), store)


@pytest.mark.parametrize(
    "places",
    [[], [0], [63, 64, 65, 255], [64, 128, 192], list(range(256))],
    ids=["none", "first", "edges", "starts", "all"],
)
def test_chosen_rows_are_those_of_all_sites(
    tiny_spec: ModelSpec, text_file: Path, store: Store, places: list[int]
):
    spec = CaptureSpec(model=tiny_spec, corpus=CorpusSpec(name=str(text_file)), tokens=64)
    found = capture(spec, store)
    assert len(found.sites) == 4
    chosen = torch.tensor(places, dtype=torch.int64)
    assert torch.equal(found.all_rows(chosen), found.all_rows()[chosen])
    strided = chosen.repeat_interleave(2)[::2]
    assert torch.equal(found.all_rows(strided), found.all_rows()[chosen]), "a view that is not contiguous"


@pytest.mark.parametrize("skip", [1, 2])
def test_skip_records_a_later_window(tiny_spec: ModelSpec, text_file: Path, store: Store, skip: int):
    spec = spec_of(tiny_spec, text_file, 100)
    found = capture(spec.with_(skip=skip), store)
    assert found.key != capture(spec, store).key
    loaded = loading.load_model(tiny_spec)
    text = text_file.read_text()
    assert "".join(found.texts) == text[100 * skip : 100 * (skip + 1)]  # one token a byte
    ids = torch.tensor([loaded.tokenizer(text).input_ids[100 * skip : 100 * (skip + 1)]])
    assert found.ids == ids[0].tolist()
    surgery.prepare(loaded)
    _, seen, residual = recorded(loaded, ids)
    for site in SITES:
        assert_near(found.rows(site), seen[site])
    assert_near(found.residual_max, residual["abs_max"])


def test_skip_beyond_the_text_is_refused_and_stores_nothing(
    tiny_spec: ModelSpec, text_file: Path, store: Store
):
    spec = spec_of(tiny_spec, text_file, 100)
    last = len(corpus.load_text(spec.corpus)) // 100 - 1
    assert capture(spec.with_(skip=last), store).tokens == 100
    with pytest.raises(
        ValueError, match=rf"windows must be at most {last + 1}: .* whole windows of 100.*; got {last + 2}"
    ):
        capture(spec.with_(skip=last + 1), store)
    assert [a.manifest["inputs"]["skip"] for a in store.list()] == [last]


OPEN_ALONE = """
import sys
from pathlib import Path
from dfrot_lab.observe.capture import Capture
from dfrot_lab.disk.artefacts import Store
[artefact] = [a for a in Store(Path(sys.argv[1])).list() if a.kind == "capture"]
found = Capture(artefact)
assert found.all_rows().shape == (4 * 128, 64) and found.rows(found.sites[3]).isfinite().all()
print(found.tokens, found.texts[:3], round(float(found.residual_max.max())), "transformers" in sys.modules)
"""


def run(script: str, *args: object, **env: str) -> str:
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_opens_where_neither_model_nor_corpus_is(tmp_path: Path, store: Store, text_file: Path):
    model = save_tiny(tmp_path / "gone")
    largest = round(float(capture(spec_of(model, text_file), store).residual_max.max()))
    shutil.rmtree(tmp_path / "gone")
    text_file.unlink()
    assert run(OPEN_ALONE, store.root) == f"128 ['0', ' ', 's'] {largest} False"


SECOND_CALL = """
import json, sys
from pathlib import Path
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec
from dfrot_lab.disk.artefacts import Store
root, model, text = sys.argv[1:]
text = CorpusSpec(name=text, split="calibration")
spec = CaptureSpec(model=ModelSpec(source=model), corpus=text, tokens=128)
print(capture(spec, Store(Path(root))).key, "transformers" in sys.modules)
"""


def test_a_second_call_loads_no_model(tiny_spec: ModelSpec, text_file: Path, store: Store):
    """In a process of its own: transformers, which any load needs, is never imported."""
    key = capture(spec_of(tiny_spec, text_file), store).key
    assert run(SECOND_CALL, store.root, tiny_spec.source, text_file) == f"{key} False"


def test_other_bytes_of_model_or_text_are_another_capture(tmp_path: Path, text_file: Path, store: Store):
    spec = spec_of(save_tiny(tmp_path / "m"), text_file)
    first = capture(spec, store)
    save_tiny(tmp_path / "m", seed=1)
    second = capture(spec, store)
    text_file.write_text("another text\n" + text_file.read_text())
    third = capture(spec, store)
    assert len({first.key, second.key, third.key}) == 3
    assert apart(first.all_rows(), second.all_rows()) > 0.1
    assert second.ids != third.ids


# ---- bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_in_the_weights_are_named_and_nothing_is_stored(
    tmp_path: Path, text_file: Path, store: Store, bad: float
):
    loaded = tiny_model()
    loaded.model.get_submodule("model.embed_tokens").weight[loaded.tokenizer("w").input_ids[0], 7] = bad
    loaded.model.save_pretrained(tmp_path / "bad")
    loaded.tokenizer.save_pretrained(tmp_path / "bad")
    with pytest.raises(
        ValueError, match=r"must be finite in float32; model\.embed_tokens\.weight has NaN or Inf"
    ):
        capture(spec_of(ModelSpec(source=str(tmp_path / "bad")), text_file), store)
    assert store.list() == []


def test_a_nan_born_later_is_named_where_it_is_born():
    loaded = prepared()
    linear = loaded.layers[1].get_submodule("self_attn.o_proj")
    linear.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"at site layers\.1\.post_attention_norm, token 0\b"):
        record(loaded, some_ids(loaded), lambda site, x: None)


@pytest.mark.parametrize("tokens", [CONTEXT + 1, 2048])
def test_more_tokens_than_the_context(tiny_spec: ModelSpec, text_file: Path, store: Store, tokens: int):
    with pytest.raises(
        ValueError, match=rf"window must be at most the model's context of {CONTEXT} tokens; got {tokens}"
    ):
        capture(spec_of(tiny_spec, text_file, tokens), store)
    assert store.list() == []


def test_more_tokens_than_the_text(tiny_spec: ModelSpec, tmp_path: Path, store: Store):
    (tmp_path / "short.txt").write_text("too short\n\nby far")
    with pytest.raises(
        ValueError, match=r"short\.txt \(calibration\) must be a text of at least one window.*; got 11 tokens"
    ):
        capture(spec_of(tiny_spec, tmp_path / "short.txt"), store)


@pytest.mark.parametrize("tokens", [0, -5])
def test_no_tokens(tokens: int):
    with pytest.raises(ValueError, match=rf"CaptureSpec\.tokens must be a whole number >= 1; got {tokens}"):
        CaptureSpec(tokens=tokens)


# ---- memory

MEASURE = """
import sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from dfrot_lab.model import families, loading, surgery
from dfrot_lab.observe.capture import record
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.specs import ModelSpec
from dfrot_lab.disk.artefacts import Store

def peak(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    work()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

sizes = dict(vocab_size=64, hidden_size=512, intermediate_size=512, num_hidden_layers=8)
config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1)
model = LlamaForCausalLM(config).eval().requires_grad_(False)
loaded = LoadedModel(model, None, families.Roles(), ModelSpec(source="x"), "x", "x")
surgery.prepare(loaded)
ids = torch.arange(2048)[None] % 64

def plain():
    with torch.inference_mode():
        loading.body(loaded)(ids, use_cache=False)

def stored(name):
    def make(writer):
        record(loaded, ids, lambda site, x: writer.save_tensors(site, {"x": x}))
    return lambda: Store(Path(sys.argv[1])).get_or_make("capture", {"name": name}, make)

stored("warm")()
print(peak(plain), peak(stored("measured")))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of one step is measured as Linux has it"
)
def test_peak_memory_above_a_plain_forward_is_at_most_three_sites(tmp_path: Path):
    """Eight layers: all 16 sites at once would be 64 MiB. Compared with a plain forward in the same,
    warmed-up process.
    """
    # Freed tensors go back to the system at once, so that the peak is of what is in use, not of what malloc
    # keeps.
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    plain, captured = map(float, run(MEASURE, tmp_path, **given_back).split())
    site = 2048 * 512 * 4 / 2**20
    assert captured - plain <= 3 * site, (
        f"{captured - plain:.1f} MiB above a plain forward, sites of {site:.0f} MiB"
    )


def test_a_capture_is_what_its_artefact_holds(tiny_spec: ModelSpec, text_file: Path, store: Store):
    found = capture(spec_of(tiny_spec, text_file), store)
    [artefact] = [a for a in store.list() if a.kind == "capture"]
    assert Capture(artefact).texts == found.texts
    assert artefact.names == sorted(["about", "residual", *SITES])
