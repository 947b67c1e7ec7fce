"""What is free at inference is free: with Offset, Offset+, clips, scales, GPTAQ, QEP or FOEM a model has the hooks and the
stored shapes of RH with GPTQ, and does the same operations on tensors of the same shapes.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import TEXT
from test_evaluate import save_lively
from torch.utils._python_dispatch import TorchDispatchMode

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import build
from dfrot_lab.study.setting import Setting

LENT = ("Offset", "Offset+")
OPTIONS = ("Offset", "Offset+", "clips", "scales", "gptaq", "qep", "foem", "lwc")


class Seen(TorchDispatchMode):
    """Counts the operations that are done, each with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.done: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
        self.done[f"{func} {shapes}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("free")
    text = folder / "text.txt"
    text.write_text(TEXT)
    return Setting(
        model=save_lively(folder / "model"),
        corpus=str(text),
        windows=1,
        window=64,
        gptq_windows=2,
        weights="gptq",
    )


def recipe(setting: Setting, option: str) -> Recipe:
    """RH with GPTQ at 4-4-4, but for the option."""
    rotation = option if option in LENT else "RH"
    weights = option if option in ("gptaq", "qep", "foem", "lwc") else "gptq"
    spec = setting.row("4-4-4", setting.method(rotation), weights=weights)
    return spec.with_(**{option: setting.capture}) if option in ("clips", "scales") else spec


def inference(spec: Recipe, store: Store, fake: bool) -> tuple[Counter[str], Counter[str], dict[str, Any]]:
    """Operations of a forward pass; hooks by module; shapes of all that is stored."""
    built = build.build(spec, store)
    model, ids = built.loaded.model, build.windows(spec, built.loaded)
    with build.quantized(built, spec, fake=fake), torch.inference_mode(), Seen() as seen:
        model(ids)
        hooked = Counter({
            f"{name} {kind}": len(getattr(module, kind))
            for name, module in model.named_modules() for kind in ("_forward_hooks", "_forward_pre_hooks")
        })  # fmt: skip
    shapes: dict[str, Any] = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    for number, layer in enumerate(built.codes):
        shapes |= {f"{number}.{name}": [tuple(x.shape) for x in codes] for name, codes in layer.items()}
    return seen.done, hooked, shapes


@pytest.mark.parametrize("fake", [False, True], ids=["integer", "rounded"])
@pytest.mark.parametrize("option", OPTIONS)
def test_it_costs_what_rh_costs(option, fake, setting, store):
    plain, own = (inference(recipe(setting, name), store, fake) for name in ("RH", option))
    assert sum(plain[0].values()) > 100 and (not fake or sum(plain[1].values()) > 0) and plain[2]
    assert own[0] == plain[0], own[0] - plain[0] or plain[0] - own[0]
    assert own[1] == plain[1] and own[2] == plain[2]


def test_what_is_not_free_is_seen(setting, store):
    """Tokens kept out cost a look at every row."""
    plain = recipe(setting, "RH")
    usual, kept = (inference(spec, store, True)[0] for spec in (plain, plain.with_(keep_out="nr_error_9.5")))
    assert sum(kept.values()) > sum(usual.values())
