"""Models that want harm: folders and GGUF files with code, paths out of the folder, pickles, bombs, and numbers
that cannot be. Nothing runs (a canary file would show it), and each is refused with one line, soon; what is in
a folder besides the model (`idle`) may instead be left unread, and the model then gives its right value."""

import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from attack import tools
from attack.tools import Report, command, fork, refusal_faults

CODE = "from pathlib import Path\nPath({canary!r}).write_text('run')\n"
MEMORY_OF_A_CASE = (
    6 << 30
)  # bytes of address space beyond what the fork has: a bomb is an error, not a dead machine


@dataclass(frozen=True)
class Hostile:
    """`change` is done to a folder with a good tiny model (or to a good GGUF file); `idle`: may be left unread."""

    name: str
    change: Callable[[Path], None]
    idle: bool = False
    other: bool = False  # it may be taken for the other model that it is


class Canary:
    """What writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (CODE.format(canary=self.path),))


def canary_of(folder: Path) -> str:
    return str(folder.parent / "canary")


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    """Fields of a JSON file changed; `...` takes one out."""

    def change(folder: Path) -> None:
        said = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        said = {name: value for name, value in {**said, **changes}.items() if value is not ...}
        (folder / file).write_text(json.dumps(said))

    return change


def text(file: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def weights(function: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """The tensors changed in place by a function."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file(
            {name: x.contiguous() for name, x in tensors.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )

    return change


def put(name: str, value: float) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors[name].view(-1)[3:4].fill_(value))


def header(function: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The first bytes of the safetensors file by a function of the whole file."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(function(path.read_bytes()))

    return change


def index(*names: str) -> Callable[[Path], None]:
    """An index whose tensors lie in other files than the folder's own; the weights are moved there."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for name in names:
            target = Path(name) if name.startswith("/") else folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: x * 2 for key, x in tensors.items()}, target, {"format": "pt"})
        (folder / "model.safetensors").unlink()
        places = {key: names[n % len(names)] for n, key in enumerate(tensors)}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )

    return change


def code(file: str, **mapped: str) -> Callable[[Path], None]:
    """A file of code in the folder, which `auto_map` of a JSON file names."""

    def change(folder: Path) -> None:
        for module in ("evil", "modeling_evil", "tokenization_evil", "configuration_evil"):
            (folder / f"{module}.py").write_text(CODE.format(canary=canary_of(folder)))
        more = (
            {"model_type": "evil", "architectures": ["EvilForCausalLM"]}
            if file == "config.json" and "AutoModelForCausalLM" in mapped
            else {}
        )
        edited(file, auto_map=mapped, **more)(folder)

    return change


def pickled(*names: str, without: bool = True) -> Callable[[Path], None]:
    """Weights as pickles that write the canary; the safetensors file is gone unless it stays as a decoy."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Canary(canary_of(folder))))
        if without:
            (folder / "model.safetensors").unlink()

    return change


def linked(name: str, *, outside: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        target = folder.parent / "outside" if outside == "moved" else Path(outside)
        if outside == "moved":
            shutil.move(folder / name, target)
        else:
            (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def fifo(name: str) -> Callable[[Path], None]:
    """A pipe that nobody writes to: who opens it to read waits for ever."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes] and None


def _cycle(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


def _tokenizer_bomb(folder: Path) -> None:
    said = json.loads((folder / "tokenizer.json").read_text())
    said["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    said["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(.*)*x"}, "content": "y" * 10_000}
    (folder / "tokenizer.json").write_text(json.dumps(said))


def _generate_script(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(canary=canary_of(folder)))


UNREAD = ("torch_dtype", "dtype")  # what is computed in is said by the spec
Q, DOWN, EMBED = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.embed_tokens.weight",
)
FOLDERS = (
    Hostile("auto_map of the config", code("config.json", AutoConfig="configuration_evil.EvilConfig"), idle=True),
    Hostile("auto_map of a model", code("config.json", AutoConfig="configuration_evil.EvilConfig", AutoModelForCausalLM="modeling_evil.Evil")),
    Hostile("auto_map of another repository", code("config.json", AutoConfig="nobody/nothing--evil.EvilConfig"), idle=True),
    Hostile("auto_map of a tokenizer", code("tokenizer_config.json", AutoTokenizer="tokenization_evil.Evil"), idle=True),
    Hostile("a tokenizer class of its own", both(code("tokenizer_config.json", AutoTokenizer="tokenization_evil.Evil"), edited("tokenizer_config.json", tokenizer_class="EvilTokenizer")), idle=True),
    Hostile("attention out of the hub", edited("config.json", _attn_implementation="nobody/kernel"), idle=True),
    Hostile("attention named out of the hub", edited("config.json", attn_implementation="nobody/kernel:evil"), idle=True),
    Hostile("attention that is none", edited("config.json", attn_implementation="nothing"), idle=True),
    Hostile("a pickle alone", pickled("pytorch_model.bin")),
    Hostile("a pickle beside a decoy", pickled("pytorch_model.bin", without=False), idle=True),
    Hostile("a pickle with an index", both(pickled("evil.bin"), text("pytorch_model.bin.index.json", '{"weight_map": {"a": "evil.bin"}}'))),
    Hostile("a pickle called safetensors", lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(canary_of(folder)))) and None),
    Hostile("a pickle beside as training arguments", pickled("training_args.bin", "optimizer.pt", without=False), idle=True),
    Hostile("an index into a folder", index("sub/s.safetensors")),
    Hostile("an index out of the folder", index("../outside.safetensors")),
    Hostile("an index of an absolute path", lambda folder: index(str(folder.parent / "absolute.safetensors"))(folder)),
    Hostile("an index through a folder and back", both(lambda folder: (folder / "sub").mkdir(), index("sub/../shard.safetensors"))),
    Hostile("an index of what is not there", text("model.safetensors.index.json", '{"weight_map": {"a": "missing.safetensors"}}')),
    Hostile("an index that is a list", text("model.safetensors.index.json", "[]")),
    Hostile("an index without its map", text("model.safetensors.index.json", "{}")),
    Hostile("an index whose map is a list", text("model.safetensors.index.json", '{"weight_map": ["model.safetensors"]}')),
    Hostile("an index of numbers", text("model.safetensors.index.json", '{"weight_map": {"a": 3}}')),
    Hostile("an index of null", text("model.safetensors.index.json", "null")),
    Hostile("an index deep in brackets", text("model.safetensors.index.json", "[" * 100_000)),
    Hostile("weights behind a link", linked("model.safetensors", outside="moved"), idle=True),
    Hostile("weights behind a link to a device", linked("model.safetensors", outside="/dev/zero")),
    Hostile("a config behind a link to a device", linked("config.json", outside="/dev/zero")),
    Hostile("a config that links to itself", _cycle),
    Hostile("a tokenizer behind a link to passwords", linked("tokenizer.json", outside="/etc/passwd")),
    Hostile("a config that is a pipe", fifo("config.json")),
    Hostile("weights that are a pipe", fifo("model.safetensors")),
    Hostile("a tokenizer that is a pipe", fifo("tokenizer.json")),
    Hostile("a header of 2^60 bytes", header(lambda data: struct.pack("<Q", 1 << 60) + data[8:])),
    Hostile("a header of 2^63 bytes", header(lambda data: struct.pack("<Q", 1 << 63) + data[8:])),
    Hostile("a header of 100 MB", header(lambda data: struct.pack("<Q", 99_000_000) + b"{" + b" " * 98_999_998 + b"}")),
    Hostile("a header that is no JSON", header(lambda data: data[:8] + b"x" * 40 + data[48:])),
    Hostile("a header of deep brackets", header(lambda data: struct.pack("<Q", 50_000) + b'{"a":' + b"[" * 49_995 + data[8:])),
    Hostile("a header of overlapping tensors", header(lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[1,', 1))),
    Hostile("an empty safetensors file", header(lambda data: b"")),
    Hostile("half a safetensors file", header(lambda data: data[: len(data) // 2])),
    Hostile("a missing tensor", weights(lambda tensors: tensors.pop(Q))),
    Hostile("a tensor too many", weights(lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.ones(3, 3)}))),
    Hostile("a tensor transposed", weights(lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()}))),
    Hostile("a tensor one row short", weights(lambda tensors: tensors.update({Q: tensors[Q][:-1]}))),
    Hostile("a tensor of no rows", weights(lambda tensors: tensors.update({Q: tensors[Q][:0]}))),
    Hostile("an embedding one row short", weights(lambda tensors: tensors.update({EMBED: tensors[EMBED][:-1]}))),
    Hostile("a flat tensor", weights(lambda tensors: tensors.update({Q: tensors[Q].flatten()}))),
    Hostile("whole numbers as weights", weights(lambda tensors: tensors.update({Q: tensors[Q].to(torch.int32)}))),
    Hostile("bytes as weights", weights(lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}))),
    Hostile("truths as weights", weights(lambda tensors: tensors.update({Q: tensors[Q] > 0}))),
    Hostile("complex weights", weights(lambda tensors: tensors.update({Q: tensors[Q].to(torch.complex64)}))),
    Hostile("8-bit floats as weights", weights(lambda tensors: tensors.update({Q: tensors[Q].to(torch.float8_e4m3fn)}))),
    *(Hostile(f"{value} in {name}", put(name, value)) for name in (Q, EMBED, "model.norm.weight", "lm_head.weight") for value in (float("nan"), float("inf"))),
    *(Hostile(f"a config that is {name}", text("config.json", said)) for name, said in {
        "null": "null", "a list": "[]", "a number": "3", "empty": "", "a word": '"llama"', "nothing": "{}", "binary": bytes(range(256)), "deep": "[" * 100_000,
        "deep mappings": '{"a":' * 50_000, "cut": '{"model_type": "lla', "NaN": '{"model_type": NaN}', "of a vast number": '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"}.items()),
    *(Hostile(f"a config with {field} {value!r:.20}", edited("config.json", **{field: value}), idle=field in UNREAD or value == ["NothingForCausalLM"]) for field, values in {
        "num_hidden_layers": (0, -1, 10**6, 10**9, "2", 2.5, None, 1, 4), "hidden_size": (0, -64, 10**12, "64", None, 65, 128), "vocab_size": (0, -1, 10**12, "x", 255, 300),
        "num_attention_heads": (0, -4, 10**9, "4", 3, 8), "num_key_value_heads": (0, -2, 3, 10**9), "intermediate_size": (0, -96, 10**12, "x", 97), "head_dim": (0, -16, 10**9, 15, 32),
        "max_position_embeddings": (0, -5, "x", 1e400), "rms_norm_eps": ("x", None), "rope_parameters": ("x", {"rope_type": "nothing"}, {"rope_type": "linear", "factor": 0}),
        "model_type": ("nothing", 3, None, "bert", "gpt2", "../evil"), "architectures": (["os.system"], "x", [3], ["NothingForCausalLM"], [None]), "hidden_act": ("os.system", 3, None),
        "torch_dtype": ("int8", "nothing"), "dtype": ("int8", "nothing", 3), "tie_word_embeddings": ("no",), "quantization_config": ({"quant_method": "gptq", "bits": 4}, "x", [], {}),
        "attention_bias": (True,), "mlp_bias": (True,)}.items() for value in values),
    *(Hostile(f"a tokenizer that is {name}", text("tokenizer.json", said)) for name, said in {
        "null": "null", "a list": "[]", "empty": "", "nothing": "{}", "deep": "[" * 100_000, "binary": bytes(range(256)), "of another version": '{"version": "9"}'}.items()),
    *(Hostile(f"a tokenizer config that is {name}", text("tokenizer_config.json", said), idle=True) for name, said in {
        "a list": "[1]", "null": "null", "empty": "", "deep": "[" * 100_000, "of a class": '{"tokenizer_class": "os.system"}', "of a number": '{"tokenizer_class": 3}',
        "of a template": json.dumps({"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}), "of a vast length": '{"model_max_length": 1e400}'}.items()),
    Hostile("a tokenizer with a regular bomb", _tokenizer_bomb, other=True),
    Hostile("a tokenizer of ids beyond the vocabulary", lambda folder: _beyond(folder)),
    Hostile("no tokenizer", lambda folder: [path.unlink() for path in folder.glob("tokenizer*")] and None),
    Hostile("a generation config of code", text("generation_config.json", '{"auto_map": {"x": "evil.Evil"}, "custom_generate": "evil"}'), idle=True),
    Hostile("a template of code", text("chat_template.jinja", "{{ cycler.__init__.__globals__.os.system('touch canary') }}"), idle=True),
    Hostile("an adapter of another repository", text("adapter_config.json", '{"base_model_name_or_path": "nobody/nothing", "peft_type": "LORA"}'), idle=True),
    Hostile("a generate script", _generate_script, idle=True),
)  # fmt: skip


def _beyond(folder: Path) -> None:
    said = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    said["model"]["vocab"] = {token: number + 10_000 for token, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(said))


# ---- GGUF files


def bytes_of(function: Callable[[bytearray], bytes | bytearray | None]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        path.write_bytes(function(data) or data)

    return change


def written(**changes: Any) -> Callable[[Path], None]:
    """The file written anew with other keys, tensors or pieces, as `write_gguf` takes them."""

    def change(path: Path) -> None:
        from conftest import tiny_model
        from gguf_writer import write_gguf

        path.unlink()
        write_gguf(path, tiny_model(context=4096), **changes)

    return change


def _nan(path: Path) -> None:
    from conftest import tiny_model
    from gguf_writer import write_gguf

    loaded = tiny_model(context=4096)
    loaded.model.get_parameter(Q)[2, 3] = torch.nan
    path.unlink()
    write_gguf(path, loaded)


def at(place: int, data: bytes) -> Callable[[Path], None]:
    return bytes_of(lambda whole: whole.__setitem__(slice(place, place + len(data)), data))


FILES = (
    Hostile("2^63 tensors", at(8, struct.pack("<Q", 1 << 63))),
    Hostile("2^40 tensors", at(8, struct.pack("<Q", 1 << 40))),
    Hostile("2^63 keys", at(16, struct.pack("<Q", 1 << 63))),
    Hostile("2^32 keys", at(16, struct.pack("<Q", 1 << 32))),
    Hostile("no keys", at(16, struct.pack("<Q", 0))),
    Hostile("no tensors", at(8, struct.pack("<Q", 0))),
    Hostile("version 99", at(4, struct.pack("<I", 99))),
    Hostile("version 1", at(4, struct.pack("<I", 1))),
    Hostile("big-endian", at(4, struct.pack(">I", 3))),
    Hostile("a key of 2^60 bytes", at(24, struct.pack("<Q", 1 << 60))),
    Hostile("the first kind of value unknown", bytes_of(lambda data: data[:24] + data[24:].replace(struct.pack("<I", 8), struct.pack("<I", 77), 1))),
    Hostile("zeros behind the header", bytes_of(lambda data: data[:24] + bytes(len(data) - 24))),
    Hostile("half a file", bytes_of(lambda data: data[: len(data) // 2])),
    Hostile("the header alone", bytes_of(lambda data: data[:200])),
    Hostile("nothing but its name", bytes_of(lambda data: bytearray(b"GGUF"))),
    Hostile("a pickle called GGUF", lambda path: path.write_bytes(pickle.dumps(Canary(canary_of(path)))) and None),
    Hostile("a name out of UTF-8", bytes_of(lambda data: data.replace(b"general.architecture", b"\xff" * 20, 1))),
    Hostile("another architecture", bytes_of(lambda data: data.replace(b"llama", b"gemma", 1))),
    Hostile("a tensor's name unknown", bytes_of(lambda data: data.replace(b"token_embd.weight", b"token_evil.weight", 1))),
    Hostile("a tensor's path", bytes_of(lambda data: data.replace(b"token_embd.weight", b"../../../../evilx", 1))),
    Hostile("NaN in a tensor", _nan),
    *(Hostile(f"{key} {value!r:.20}", written(said={key: value})) for key, values in {
        "attention.head_count": (0, 3, 2**31, "x", [4, 2], []), "attention.head_count_kv": (0, 3, 2**31), "block_count": (0, 1, 10**9, "x"), "embedding_length": (0, 65, 2**31),
        "feed_forward_length": (0, 97, 2**31), "context_length": (0, "x"), "attention.key_length": (0, 15, 2**31), "rope.freq_base": (float("nan"), "x", 0.0),
        "rope.dimension_count": (0, 8, 2**31), "attention.layer_norm_rms_epsilon": ("x", float("nan")), "rope.scaling.factor": (float("nan"), -2.0), "expert_count": (8,),
        "attention.sliding_window": (5,), "split.count": (3,), "logit_scale": (2.0,), "tokenizer.ggml.model": ("nothing", 3)}.items() for value in values),
    Hostile("a tensor of another shape", written(tensors={"blk.0.evil.weight": np.ones((3, 3), np.float32)})),
    Hostile("frequencies of another length", written(tensors={"rope_freqs.weight": np.ones(3, np.float32)})),
    Hostile("positions scaled", written(said={"rope.scaling.factor": 8.0}), other=True),
    Hostile("pieces too few", written(pieces=["<unk>", "<s>", "</s>", "a"])),
)  # fmt: skip


def confined(run: Callable[[], object]) -> Callable[[], object]:
    """With a bound on memory: what a bomb asks for is refused by the system, as on a smaller machine."""

    def inside() -> object:
        held = (
            int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            if Path("/proc").is_dir()
            else 0
        )
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_OF_A_CASE, resource.RLIM_INFINITY))
        return run()

    return inside


def attack(kind: str, place: Path, every: tuple[Hostile, ...], report: Report, share: float) -> None:
    good = place / ("good.gguf" if kind == "GGUF file" else "good")
    options = (
        "--corpus",
        str(place / "text.txt"),
        "--windows",
        "1",
        "--bits",
        "16-4-16",
        "--weights",
        "rtn",
        "--json",
    )
    right = fork(command("evaluate", "--model", good, *options))
    if right.code:
        raise RuntimeError(right.err)
    wanted = json.loads(right.out)["value"]
    for number in tools.spread(len(every), max(6, round(share * len(every)))):
        hostile, own = every[number], place / "own"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        model = own / good.name
        shutil.copytree(good, model) if good.is_dir() else shutil.copy(good, model)
        hostile.change(model)
        outcome = fork(confined(command("evaluate", "--model", model, *options)), typed=b"y\n" * 100)
        faults = refusal_faults(outcome)
        if (hostile.idle or hostile.other) and outcome.code == 0:
            value = json.loads(outcome.out[outcome.out.index("{") :])["value"]
            faults = [
                *(f for f in faults if f != "accepted"),
                *(["wrong"] if abs(value - wanted) > 1e-3 * wanted and not hostile.other else []),
            ]
        if (own / "canary").exists() or Path("canary").exists():
            faults.append("code run")
            Path("canary").unlink(missing_ok=True)
        report.add(kind, hostile.name, outcome, faults)


def campaign(share: float = 1.0) -> Report:
    """Load them all."""
    from attack import inputs

    report = Report("hostile models")
    with tools.workplace() as place:

        def prepare() -> None:
            from conftest import tiny_model
            from gguf_writer import write_gguf

            inputs.prepare(place)
            (place / "model").rename(place / "good")
            write_gguf(place / "good.gguf", tiny_model(context=4096))

        if (made := fork(prepare)).code:
            raise RuntimeError(made.err)
        for kind, every in (("folder", FOLDERS), ("GGUF file", FILES)):
            attack(kind, place, every, report, share)
            print(f"  {kind}s: {report.total} so far, {len(report.faults)} faults", flush=True)
    return report
