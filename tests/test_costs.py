"""Which rounding costs which words: rounded in one place alone, by hooks of torch alone; causal; kept once."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import LAYERS, TEXT
from test_evaluate import save_lively
from test_families import folder_of
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import hooks, loading, surgery
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, Recipe, RotationSpec, recipe_of
from dfrot_lab.score import build, costs, divergence
from dfrot_lab.study import experiments
from dfrot_lab.study.setting import Setting

WORDS = 20
GRID = QuantSpec(scheme="asymmetric")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("costs")
    (root / "text.txt").write_text(TEXT)
    save_lively(root / "model")
    return root


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return Store(folder / "store")


def recipe_in(folder: Path, kind: str = "NR", model: str = "model", **fields: object) -> Recipe:
    of = {"model": ModelSpec(source=str(folder / model)), "corpus": CorpusSpec(name=str(folder / "text.txt"))}
    said = {"rotation": RotationSpec(kind=kind), "windows": 1, "window": WORDS, **of, **fields}
    return recipe_of("16-4-16", **said)


def window(recipe: Recipe) -> Tensor:
    tokenizer = loading.load_model(recipe.model).tokenizer
    return torch.tensor(tokenizer("1 goat\nand 2 sheep over a hill;").input_ids[:WORDS])


def by_hand(recipe: Recipe, ids: Tensor, layers: set[int], names: set[str], tokens: set[int]) -> Tensor:
    """KL(plain || rounded) word by word, by transformers, torch's hooks and float64."""
    loaded = loading.load_model(recipe.model)
    surgery.prepare(loaded)
    plain = loaded.model(ids[None]).logits[0].double().log_softmax(-1)
    handles = []
    for number in layers:
        for name, module in loaded.layers[number].named_modules():
            if name.rpartition(".")[2] in names:

                def rounded(_module: object, args: tuple[Tensor]) -> tuple[Tensor]:
                    x = args[0].clone()
                    for token in tokens:
                        x[0, token] = fake_quantize(x[0, token][None], GRID)[0]
                    return (x,)

                handles.append(module.register_forward_pre_hook(rounded))
    found = loaded.model(ids[None]).logits[0].double().log_softmax(-1)
    return (plain.exp() * (plain - found)).sum(-1)[:-1]


READERS = {
    "input_norm": {"q_proj", "k_proj", "v_proj"},
    "post_attention_norm": {"gate_proj", "up_proj"},
    "o_proj_in": {"o_proj"},
    "down_proj_in": {"down_proj"},
}
ALL = set().union(*READERS.values())
ANY = set(range(LAYERS))


@pytest.mark.parametrize(("way", "name"), [
    ("token", "3"), ("token", "6"), ("layer", "1"), ("site", "down_proj_in"), ("site", "input_norm"), ("all", "all"),
])  # fmt: skip
def test_one_place_alone_is_rounded(way: str, name: str, folder: Path, store: Store):
    recipe = recipe_in(folder)
    ids = window(recipe)
    names, found = costs.of_window(recipe, ids, store)[way]
    layers = {int(name)} if way == "layer" else ANY
    readers = READERS[name] if way == "site" else ALL
    tokens = {int(name)} if way == "token" else set(range(WORDS))
    wanted = by_hand(recipe, ids, layers, readers, tokens)
    assert float(wanted.max()) > 1e-5
    torch.testing.assert_close(found[names.index(name)].double(), wanted, rtol=0.02, atol=2e-6)


@pytest.mark.parametrize("kind", ["NR", "RH"])
def test_all_at_once_is_the_recipe_s_own_divergence(kind: str, folder: Path, store: Store):
    recipe = recipe_in(folder, kind)
    ids = window(recipe)
    built = build.build(recipe, store)
    [reference] = divergence.references(recipe, ids[None], store)
    with build.quantized(built, recipe, fake=True):
        wanted = divergence.window_measures(built, ids, reference)[:, costs.DIVERGENCE]
    names, found = costs.of_window(recipe, ids, store)["all"]
    assert names == ["all"]
    torch.testing.assert_close(found[0], wanted, rtol=0.02, atol=2e-6)
    by_token = costs.of_window(recipe, ids, store)["token"][1]
    assert not torch.allclose(by_token.sum(0), wanted, rtol=0.02, atol=1e-5), "parts do not add up"


def test_a_token_s_rounding_costs_no_word_before_it(folder: Path, store: Store):
    recipe = recipe_in(folder, "RH")
    ids = window(recipe)
    names, found = costs.of_window(recipe, ids, store)["token"]
    assert names == [str(token) for token in range(WORDS - 1)] and found.shape == (WORDS - 1, WORDS - 1)
    before = torch.ones_like(found, dtype=torch.bool).tril(-1)
    assert found[before].abs().max() < 2e-6 < found[~before].max()


def test_what_is_kept_is_not_computed_again_and_another_question_is(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_in(folder)
    ids = window(recipe)
    wanted = costs.of_window(recipe, ids, store)
    asked: list[int] = []
    monkeypatch.setattr(
        costs, "divergences", lambda *of: asked.append(1) or torch.zeros(len(of[-1]), WORDS - 1)
    )
    again = costs.of_window(recipe, ids, store)
    assert not asked and all(torch.equal(again[way][1], wanted[way][1]) for way in costs.WAYS)
    coarse = recipe.with_(activations=recipe.activations.with_(bits=3))
    for other in ((coarse, ids), (recipe_in(folder, "RO"), ids), (recipe, ids.flip(0))):
        asked.clear()
        costs.of_window(*other, store)
        assert len(asked) == 4


def test_places_are_all_sites_once(folder: Path, tmp_path: Path):
    loaded = loading.load_model(ModelSpec(source=str(folder / "model")))
    sites = set(hooks.sites_of(loaded, *hooks.LINEAR_INPUTS))
    assert [place.name for place in costs.places(loaded, "site", 9)] == [*READERS]
    for way in ("layer", "site", "all"):
        parts = [place.sites for place in costs.places(loaded, way, 9)]
        assert set().union(*parts) == sites and sum(map(len, parts)) == len(sites)
    experts = loading.load_model(ModelSpec(source=str(folder_of("mixtral", tmp_path / "m"))))
    named = [place.name for place in costs.places(experts, "site", 9)]
    assert set(named) == set(READERS), "experts read the norm's site"
    with pytest.raises(
        ValueError, match="without experts, whose tokens are not told apart; got MixtralForCausalLM"
    ):
        costs.places(experts, "token", 9)


def test_what_is_not_rounding_alone_is_refused(folder: Path, store: Store):
    recipe = recipe_in(folder)
    ids = window(recipe)
    with pytest.raises(ValueError, match=r"Recipe.bits must be of rounded activations alone.*; got 16-16-16"):
        costs.of_window(recipe.with_(activations=recipe.activations.with_(bits=16)), ids, store)
    with pytest.raises(ValueError, match=r"Recipe.bits must be .*; got 16-4-4"):
        costs.of_window(
            recipe.with_(keys=recipe.keys.with_(bits=4), values=recipe.values.with_(bits=4)), ids, store
        )
    with pytest.raises(ValueError, match=r"Recipe.set_massive must be None.*; got zero"):
        costs.of_window(recipe.with_(set_massive="zero"), ids, store)
    with pytest.raises(ValueError, match="ids must be of two tokens or more; got 1 tokens"):
        costs.of_window(recipe, ids[:1], store)
    with pytest.raises(ValueError, match="way must be one of all, token, layer, site; got 'head'"):
        costs.places(loading.load_model(recipe.model), "head", 3)


# ---- the experiments' tables


@pytest.fixture(scope="module")
def tables(folder: Path, store: Store) -> dict[str, pd.DataFrame]:
    model, text = ModelSpec(source=str(folder / "model")), str(folder / "text.txt")
    setting = Setting(model=model, corpus=text, windows=2, window=64, builds=1, quick=True)
    return {
        name: experiments.run(name, setting, store)
        for name in ("spike-writers", "attention-sink", "token-costs")
    }


def test_the_writers_table_says_who_wrote_the_newline_s_value(tables: dict[str, pd.DataFrame]):
    table = tables["spike-writers"]
    assert set(table["part"]) == {"writes", "neurons", "gate", "up", "reads"}
    assert set(table["channel"]) == {3} and set(table["text"]) == {"\n"}
    writes = table[table["part"] == "writes"]
    assert writes.loc[writes["value"].idxmax(), "writer"] == "embedding" and writes["value"].max() > 390
    first = table[(table["part"] == "neurons") & (table["metric"] == "gate")].iloc[0]
    assert table.loc[table["part"] == "gate", "value"].sum() == pytest.approx(first["value"], rel=1e-4)
    assert set(table.loc[table["part"] == "gate", "neuron"]) == {first["neuron"]}


def test_the_sink_table_has_a_line_a_head_and_a_loss_a_way(tables: dict[str, pd.DataFrame]):
    table = tables["attention-sink"]
    shares = table[table["metric"] == "sink share"]
    assert shares.groupby("massive").size().to_dict() == dict.fromkeys(set(shares["massive"]), LAYERS * 4)
    assert shares["value"].between(0, 1).all() and len(set(shares["massive"])) == 4
    losses = table[table["metric"] == "loss"].set_index("massive")["value"]
    assert len(losses) == 4 and losses["zero"] != losses["left alone"]
    assert len(table[table["metric"].str.startswith("length of v")]) == LAYERS * 2


def test_the_costs_table_is_what_was_found(tables: dict[str, pd.DataFrame], store: Store, folder: Path):
    table = tables["token-costs"]
    assert set(table["rotation"]) == {"NR", "RH"} and set(table["rounded"]) == set(costs.WAYS)
    own = table[(table["rotation"] == "RH") & (table["rounded"] == "token")]
    wide = own.assign(place=own["place"].astype(int)).pivot(index="place", columns="word", values="value")
    assert wide.shape == (15, 15) and abs(wide.iloc[9, :9]).max() < 2e-6
