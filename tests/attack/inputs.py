"""What must not be said to the command line: every wrong option, file, recipe, text and setting is refused with
one line and an exit code that is not 0, soon and without a traceback."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from attack import tools
from attack.tools import Report, command, fork, refusal_faults

NUMBERS: dict[str, tuple[str, ...]] = {
    "--seed": ("-1", "1.5", "x", "", "nan", "99999999999999999999"),
    "--windows": ("0", "-1", "x", "1.5", "999999", ""),
    "--gamma": ("0", "-1", "nan", "x", "", "1e308", "-inf"),
    "--rule": ("x", "", "ratio_9", "SUN"),
    "--dtype": ("int8", "x", "", "float33"),
    "--weights": ("x", "", "GPTQ", "awq"),
    "--bits": ("4", "4-4", "4-4-4-4", "a-b-c", "1-4-16", "4-1-16", "4-4-1", "99-4-4", "", "-4-4-16", "4_4_16", "4-4-17", "4.5-4-4"),
    "--rotation": ("XX", "", "RH-b7", "RH-b0", "RH-b-1", "RO-b5", "RH-b999999", "RH-b", "rh", "NR RO", "model", "missing.safetensors"),
    "--model": ("missing", "", " ", "hub:", "hub:x", "hub:nobody/nothing", "nobody/nothing", "..", "missing.gguf", "llama-2-7b", "~nobody/x"),
    "--corpus": ("missing.txt", "", " ", "model", "wikitext3", "/proc", "x" * 5000),
    "--calibration": ("missing.txt", " ", "model", "x" * 5000),
}  # fmt: skip
"""Of `evaluate`: options and what none of them takes."""
FILES: dict[str, tuple[str, ...]] = {
    "--corpus": ("empty.txt", "blank.txt", "short.txt", "binary.txt", "utf16.txt", "latin.txt", "nul.bin", "/dev/null"),
    "--calibration": ("empty.txt", "blank.txt", "short.txt", "binary.txt", "utf16.txt"),
    "--rotation": ("empty.txt", "binary.txt", "wide.safetensors", "scaled.safetensors", "nan.safetensors", "whole.safetensors",
                   "flat.safetensors", "none.safetensors", "cut.safetensors", "torch.pt", "array.npy", "two.safetensors"),
    "--model": ("empty.gguf", "binary.gguf", "text.txt", "empty", "config-only", "weights-only", "folder.gguf", "wide.safetensors"),
}  # fmt: skip
OTHERS: tuple[tuple[str, ...], ...] = (
    (), ("nothing",), ("evaluate", "--nothing"), ("evaluate", "extra"), ("--seed", "1"), ("recipe", "RH", "4-4-16", "x"),
    ("recipe", "XX"), ("recipe", "RH", "4-4"), ("recipe", "RH", "x"), ("recipe", "--seed"), ("recipe", "--out", "empty"),
    ("recipe", "--out", "text.txt/below"), ("recipe", "--out", "/proc/nothing/x"),
    ("experiment", "nothing"), ("experiment", "gamma-sweep", "--limit", "-1"), ("experiment", "gamma-sweep", "--limit", "x"),
    ("compare",), ("compare", "--models", ""), ("compare", "--models", "model"), ("compare", "--models", "model,model"),
    ("compare", "--models", "model,missing"), ("compare", "--models", ",,,"), ("compare", "--models", "model,text.txt"),
    ("run", "--dry-run", "--model", "missing"), ("run", "--dry-run", "--gamma", "nan"), ("run", "--rule", "x"),
    ("run", "--model", "llama-2-7b"), ("run", "--windows", "0"), ("run", "--dry-run", "--windows", "-2"), ("run", "--seed", "-3"),
    ("models", "--model", "text.txt"), ("models", "--model", "model", "--dtype", "int4"), ("models", "--out", "text.txt/x", "--model", "model"),
    ("fetch", "--model", "missing"), ("fetch", "--model", "model", "--corpus", "missing.txt"), ("fetch", "--model", "model", "--corpus", "empty.txt"),
    ("doctor", "--model", "missing"), ("doctor", "--corpus", "missing.txt", "--model", "model"), ("doctor", "--corpus", "empty.txt"),
    ("report", "--out", "missing/report.html"), ("report", "--out", "model"), ("report", "--model", "missing", "--out", "r.html"),
    ("figures", "--model", "missing"), ("figures", "--out", "text.txt", "--model", "missing"),
)  # fmt: skip
SMALL: dict[str, dict[str, tuple[str, ...]]] = {
    "capture": {"--tokens": ("0", "-5", "x", "2049", "100000", "1.5"), "--out": ("t.xlsx", "model", "t", "text.txt/t.csv"), "--dtype": ("int8",)},
    "errors": {"--bits": ("1", "0", "-4", "17", "x", "4.5"), "--scheme": ("x", "", "sym"), "--tokens": ("0", "x"), "--out": ("t.xls", "empty"),
               "--rule": ("x",), "--seed": ("-1",)},
    "refine": {"--init": ("x", "", "file", "RH-b7"), "--steps": ("0", "-1", "x", "1.5"), "--variant": ("x", "", "released"), "--gamma": ("-1", "nan"),
               "--out": ("model", "text.txt/R1.safetensors", "/proc/nothing/R1.safetensors"), "--tokens": ("0",), "--rule": ("nothing",)},
    "evaluate": {"--out": ("model", "text.txt/rows.jsonl", "/proc/nothing/rows.jsonl"), "--recipe": ("missing.yaml", "model", "text.txt/x")},
}  # fmt: skip
RECIPES: dict[str, str | bytes] = {
    "empty": "", "null": "null", "a number": "3", "a list": "[1, 2]", "a word": "hello", "open": "{model: [", "tabs": "\tmodel: x", "binary": bytes(range(256)),
    "utf16": "model: {source: model}".encode("utf-16"), "unknown field": "modle: {source: model}", "unknown inner": "model: {sauce: model}",
    "a spec as a word": "model: model", "a spec as a list": "weights: [gptq]", "bits as a word": "activations: {bits: four}", "bits too few": "activations: {bits: 1}",
    "bits with a point": "activations: {bits: 4.5}", "bits as a truth": "activations: {bits: true}", "windows 0": "windows: 0", "windows as a word": "windows: six",
    "windows vast": f"windows: {10**40}", "negative window": "window: -4", "a clip of 0": "activations: {clip_ratio: 0}", "a clip of 2": "activations: {clip_ratio: 2}",
    "a clip nan": "activations: {clip_ratio: .nan}", "scheme": "activations: {scheme: asym}", "granularity": "activations: {granularity: per_row}",
    "group": "keys: {group_size: 0}", "group of a float": "keys: {group_size: 2.5}", "method": "rotation: {method: nothing}", "kind": "rotation: {kind: RX}",
    "seed": "rotation: {seed: -1}", "block": "rotation: {block: 7}", "a file without a path": "rotation: {kind: file}", "a path without a file": "rotation: {kind: RH, path: x}",
    "a path that is missing": "rotation: {kind: file, path: missing.safetensors}", "a module": "rotation: {method: os.system}", "weights": "weights: {method: nothing}",
    "damping": "weights: {damping: 0}", "damping nan": "weights: {damping: .nan}", "keep-out": "keep_out: nothing", "keep-out counted": "keep_out: worst",
    "tokens without keep-out": "keep_out_tokens: 4", "massive": "set_massive: zero", "massive as a number": "set_massive: 3", "split": "corpus: {split: all}",
    "text": "corpus: {name: missing.txt}", "no text": "corpus: {name: ''}", "device": "model: {source: model, device: tpu}", "dtype": "model: {source: model, dtype: int8}",
    "python": "!!python/object/apply:os.system ['touch canary']", "python name": "model: !!python/name:os.system", "python new": "!!python/object/new:os.system [touch canary]",
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "deep": "[" * 20_000, "deep mapping": "{a: " * 3_000, "a cycle": "&a [*a]", "a cycle in a spec": "model: &a {source: *a}", "keys that are lists": "? [a]\n: b",
    "keys that are numbers": "3: 4", "two documents": "windows: 2\n---\nwindows: 3", "a date": "windows: 2020-01-01", "a vast number": "rotation: {seed: 1e400}",
    "block as a word": "mlp_block: seven", "block of no matrix": "mlp_block: 7", "head block": "head_block: 0", "gamma": "rotation: {method: dfrot, gamma: 0}",
    "gamma vast": "rotation: {method: dfrot, gamma: 1e300}", "steps": "rotation: {method: dfrot, steps: 0}", "rule": "rotation: {method: dfrot, rule: x}",
    "variant": "rotation: {method: dfrot, variant: x}", "rows": "rotation: {method: dfrot, rows: -1}", "quantizer": "rotation: {method: dfrot, quantizer: {bits: 16}}",
    "capture": "rotation: {method: dfrot, capture: {tokens: 0}}", "capture as a word": "rotation: {method: dfrot, capture: all}",
    "init": "rotation: {method: dfrot, init: {kind: file}}", "released inf": "rotation: {method: dfrot, variant: as_released, gamma: .inf}",
}  # fmt: skip
SETTINGS: tuple[dict[str, str], ...] = (
    {"DFROT_LAB_DEVICE": "tpu"}, {"DFROT_LAB_DEVICE": ""}, {"DFROT_LAB_DEVICE": "cuda"}, {"DFROT_LAB_MEMORY": "much"}, {"DFROT_LAB_MEMORY": "-1"}, {"DFROT_LAB_MEMORY": "nan"},
    {"DFROT_LAB_CACHE": "text.txt"}, {"DFROT_LAB_CACHE": "/proc/nothing"}, {"DFROT_LAB_CACHE": "text.txt/below"},
)  # fmt: skip
COMMON = (
    "--model",
    "model",
    "--corpus",
    "text.txt",
    "--windows",
    "1",
    "--bits",
    "16-4-16",
    "--weights",
    "rtn",
)


def prepare(folder: Path) -> None:
    """A tiny model that sees windows of 2048, a good text, and files that are no good."""
    from conftest import save_tiny

    save_tiny(folder / "model", context=4096)
    tools.text_file(folder / "text.txt", 2000)
    texts = {
        "empty.txt": b"", "blank.txt": b" \n\n \n", "short.txt": b"ten words", "binary.txt": os.urandom(5000), "utf16.txt": "some text".encode("utf-16"),
        "latin.txt": "grün und groß ".encode("latin-1") * 2000, "nul.bin": b"\xff\0" * 4000, "empty.gguf": b"", "binary.gguf": b"GGUF" + os.urandom(4000),
        "cut.safetensors": (200).to_bytes(8, "little") + b'{"R1": ', "torch.pt": b"PK\3\4" + bytes(90), "array.npy": b"\x93NUMPY" + bytes(90),
    }  # fmt: skip
    for name, data in texts.items():
        (folder / name).write_bytes(data)
    for name in ("empty", "folder.gguf", "config-only", "weights-only"):
        (folder / name).mkdir()
    (folder / "config-only" / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    (folder / "weights-only" / "model.safetensors").write_bytes(
        (folder / "model" / "model.safetensors").read_bytes()
    )
    eye = torch.eye(64)
    rotations = {
        "wide": {"R1": torch.eye(96)}, "scaled": {"R1": eye * 1.1}, "nan": {"R1": eye * torch.nan}, "whole": {"R1": eye.int()}, "flat": {"R1": torch.ones(64)},
        "none": {"x": torch.ones(3, 4)}, "two": {"a": eye, "b": eye.clone()},
    }  # fmt: skip
    for name, tensors in rotations.items():
        save_file(tensors, folder / f"{name}.safetensors")


def cases() -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(kind, arguments, environment)."""
    for table, kind in ((NUMBERS, "an option's value"), (FILES, "a file")):
        for option, values in table.items():
            for value in values:
                used = ["--rotation", "DFRot"] if option in ("--gamma", "--rule", "--calibration") else []
                yield kind, ["evaluate", *COMMON, *used, option, value], {}
    for name, options in SMALL.items():
        own = [
            "--model",
            "model",
            "--corpus",
            "text.txt",
            *(["--bits", "16-4-16", "--windows", "1"] if name == "evaluate" else []),
        ]
        for option, values in options.items():
            for value in values:
                less = own[:4] if option == "--recipe" else own
                yield "an option's value", [name, *(() if option == "--recipe" else less), option, value], {}
    yield from (("a command", list(arguments), {}) for arguments in OTHERS)
    yield from (("a recipe", ["evaluate", "--recipe", f"recipe-{n}.yaml"], {}) for n in range(len(RECIPES)))
    yield from (
        ("a recipe", ["evaluate", "--recipe", "recipe-0.yaml", *more], {})
        for more in (["--seed", "1"], ["--bits", "4-4-16"])
    )
    for setting in SETTINGS:
        writes = ["evaluate", *COMMON] if "DFROT_LAB_CACHE" in setting else ["models", "--model", "model"]
        yield "a setting", writes, setting
    yield "a setting", ["evaluate", *COMMON, "--corpus", "wikitext2"], {"DFROT_LAB_DATA": "missing"}
    yield (
        "a setting",
        ["experiment", "gamma-sweep", "--model", "model", "--corpus", "empty.txt"],
        {"DFROT_LAB_PROFILE": "x"},
    )


def wrote_recipes(folder: Path) -> None:
    """Each recipe as a file; what it does not say of model, text and size is said, so that what it says is tried."""
    said = "model: {source: model}\ncorpus: {name: text.txt}\nwindows: 1\n"
    for n, (name, text) in enumerate(RECIPES.items()):
        if (
            isinstance(text, str)
            and text[:1].isalpha()
            and ":" in text
            and name not in ("laughs", "two documents", "a word")
        ):
            fields = {line.partition(":")[0] for line in text.splitlines()}
            text += "\n" + "".join(
                line + "\n" for line in said.splitlines() if line.partition(":")[0] not in fields
            )
        (folder / f"recipe-{n}.yaml").write_bytes(text.encode() if isinstance(text, str) else text)


def with_settings(run: Callable[[], object], setting: dict[str, str]) -> Callable[[], object]:
    def settled() -> object:
        os.environ |= setting
        return run()

    return settled


def campaign(share: float = 1.0) -> Report:
    """Say all of it."""
    report = Report("bad inputs")
    with tools.workplace() as folder:
        fork(lambda: prepare(folder))
        wrote_recipes(folder)
        good = fork(command("evaluate", *COMMON))
        if good.code:
            raise RuntimeError(f"what is right is refused: {good.err}")
        every = list(cases())
        for number in tools.spread(len(every), max(12, round(share * len(every)))):
            kind, arguments, setting = every[number]
            outcome = fork(with_settings(command(*arguments), setting), typed=b"y\n" * 50)
            faults = refusal_faults(outcome)
            if not arguments or arguments[0] == "doctor":  # these answer with a page, and with the exit code
                faults = [fault for fault in faults if fault != "not one line"]
            if (folder / "canary").exists():
                faults.append("code run")
                (folder / "canary").unlink()
            shown = " ".join(each if len(each) < 60 else f"{each[:20]}..." for each in arguments)
            if arguments[:2] == ["evaluate", "--recipe"] and arguments[2].startswith("recipe-"):
                shown += f" ({list(RECIPES)[int(arguments[2][7:-5])]})"
            report.add(kind, f"{shown!r} {setting or ''}", outcome, faults)
    print(f"  {report.total} bad inputs, {len(report.faults)} faults", flush=True)
    return report
