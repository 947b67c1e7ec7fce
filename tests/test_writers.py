"""Who writes a value of the residual stream and who reads it: parts that sum to the whole in every family, neurons
and readers by hand, a planted neuron that is found.
"""

from pathlib import Path

import pandas as pd
import pytest
import torch
from again import assert_near
from conftest import CHANNELS, INNER, tiny_model
from test_families import folder_of, load
from torch import Tensor

from dfrot_lab.model import checkpoint, stream, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import inside, writers
from dfrot_lab.study.inside import written_at

FAMILIES = (
    "llama", "llama with biases", "qwen2", "qwen3", "granite", "mixtral", "qwen2_moe", "gemma", "phi3", "opt",
    "gpt_neox",
)  # fmt: skip
"""Of the families those that write into the stream each in its own way."""
WINDOW = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(0))
TOKEN, CHANNEL = 11, 5


def ready(case: str, folder: Path) -> LoadedModel:
    loaded = load(folder_of(case, folder / "m"))
    surgery.prepare(loaded)
    return loaded


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    return {case: ready(case, tmp_path_factory.mktemp("families")) for case in FAMILIES}


def streams(loaded: LoadedModel) -> list[Tensor]:
    """Before each layer, and after the last."""
    found = [seen["residual"] for _, seen in inside.walked(loaded, WINDOW, "residual")]
    return [*found, stream.through(loaded, [WINDOW[None]])[0][0]]


# ---- who writes


@pytest.mark.parametrize("case", FAMILIES)
def test_the_parts_sum_to_the_stream_before_every_layer(case: str, prepared: dict[str, LoadedModel]):
    loaded = prepared[case]
    direction = torch.randn(CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = writers.writes(loaded, WINDOW, TOKEN, direction)
    height = table.groupby("layer")["value"].sum().cumsum().tolist()
    wanted = [float(x[TOKEN] @ direction) for x in streams(loaded)]
    assert height == pytest.approx(wanted, rel=1e-10, abs=1e-10)
    assert len(table[table["head"].notna()]) == 3 * 4, "each head of each layer"
    part = writers.writes(loaded, WINDOW, TOKEN, direction, before=2)
    pd.testing.assert_frame_equal(part, table[table["layer"] < 2].reset_index(drop=True))


def test_a_head_s_part_is_its_columns_of_o_proj_times_its_values(prepared: dict[str, LoadedModel]):
    loaded = prepared["qwen3"]
    table = writers.writes(loaded, WINDOW, TOKEN, writers.one_hot(CHANNEL, CHANNELS))
    o = loaded.layers[1].self_attn.o_proj.weight
    own = dict(inside.walked(loaded, WINDOW, "o_proj_in"))[1]["o_proj_in"][TOKEN]
    size = len(own) // 4
    wanted = [
        sum(float(o[CHANNEL, i] * own[i]) for i in range(head * size, head * size + size))
        for head in range(4)
    ]
    found = table.query("layer == 1 and writer == 'attention'").sort_values("head")["value"]
    assert found.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("case", ["llama", "llama with biases", "phi3", "opt", "mixtral", "qwen2_moe"])
def test_all_neurons_together_are_what_the_mlp_writes(case: str, prepared: dict[str, LoadedModel]):
    loaded, layer = prepared[case], 2
    found = writers.neurons(loaded, WINDOW, TOKEN, CHANNEL, layer, top=10_000)
    table = writers.writes(loaded, WINDOW, TOKEN, writers.one_hot(CHANNEL, CHANNELS))
    [wanted] = table.query("layer == @layer and writer == 'mlp'")["value"]
    plain = not loaded.roles.experts
    down = loaded.layers[layer].get_submodule(loaded.roles.down) if plain else None
    bias = 0.0 if down is None or down.bias is None else float(down.bias[CHANNEL])
    assert found["value"].sum() + bias == pytest.approx(wanted)
    assert found["value"].abs().is_monotonic_decreasing
    few = writers.neurons(loaded, WINDOW, TOKEN, CHANNEL, layer, top=3)
    assert few["neuron"].tolist() == found["neuron"].tolist()[:3]
    assert (found["gated"] * found["down"]).to_numpy() == pytest.approx(found["value"].to_numpy())


def test_a_neuron_s_gate_and_up_are_those_of_its_rows(prepared: dict[str, LoadedModel]):
    for case in ("qwen3", "phi3"):
        loaded, layer = prepared[case], 1
        found = writers.neurons(loaded, WINDOW, TOKEN, CHANNEL, layer, top=4)
        mlp = loaded.layers[layer].mlp
        rows = dict(inside.walked(loaded, WINDOW, "post_attention_norm"))[layer]["post_attention_norm"]
        fused = case == "phi3"
        gate, up = mlp.gate_up_proj(rows).chunk(2, -1) if fused else (mlp.gate_proj(rows), mlp.up_proj(rows))
        gated = torch.nn.functional.silu(gate) * up
        for row in found.to_dict("records"):
            n, others = row["neuron"], [i for i in range(24) if i != TOKEN]
            seen = (row["gate"], row["up"], row["gated"], row["down"], row["value"])
            weight = mlp.down_proj.weight[CHANNEL, n]
            wanted = (gate[TOKEN, n], up[TOKEN, n], gated[TOKEN, n], weight, weight * gated[TOKEN, n])
            assert seen == pytest.approx([float(x) for x in wanted], rel=1e-6)
            usual = sorted(abs(float(gate[i, n])) for i in others)[len(others) // 2]
            assert row["gate_usual"] == pytest.approx(usual)
            assert row["up_usual"] == pytest.approx(float(up[others, n].abs().median()))


def test_shares_of_neurons_are_of_all_that_the_mlp_adds(prepared: dict[str, LoadedModel]):
    found = writers.neurons(prepared["llama"], WINDOW, TOKEN, CHANNEL, 1, top=INNER)
    assert found["share"].sum() == pytest.approx(1)
    assert found["share"].to_numpy() == pytest.approx((found["value"] / found["value"].sum()).to_numpy())


@pytest.mark.parametrize("part", ["gate", "up"])
@pytest.mark.parametrize("case", ["llama", "llama with biases", "granite", "phi3", "gemma"])
def test_what_is_behind_a_neuron_sums_to_its_gate_and_its_up(
    case: str, part: str, prepared: dict[str, LoadedModel]
):
    loaded, layer = prepared[case], 2
    row = writers.neurons(loaded, WINDOW, TOKEN, CHANNEL, layer, top=1).iloc[0]
    table = writers.behind(loaded, WINDOW, TOKEN, layer, int(row["neuron"]), part)
    bias = 0.0
    if case == "llama with biases":
        bias = float(loaded.layers[layer].get_submodule(f"mlp.{part}_proj").bias[int(row["neuron"])])
    assert table["value"].sum() + bias == pytest.approx(row[part], rel=1e-5)
    last = table[table["layer"] == layer]
    assert set(last["writer"]) == {"attention"}, "the layer's own MLP comes after"


def test_a_planted_neuron_is_found():
    """Neuron 7 of layer 1 adds 1000 times its gated value to channel 9."""
    loaded = tiny_model(plant=False)
    loaded.layers[1].mlp.down_proj.weight[9, 7] = 1000.0
    surgery.prepare(loaded)
    gated = dict(inside.walked(loaded, WINDOW, "down_proj_in"))[1]["down_proj_in"][:, 7]
    token = int(gated.abs().argmax())
    table = writers.writes(loaded, WINDOW, token, writers.one_hot(9, CHANNELS))
    assert written_at(table) == 1 and table["value"].abs().idxmax() == table.index[-1]
    row = writers.neurons(loaded, WINDOW, token, 9, 1).iloc[0]
    assert row["neuron"] == 7 and row["value"] == pytest.approx(1000 * float(gated[token]), rel=1e-5)
    assert row["share"] == pytest.approx(1, abs=0.01)


def test_the_layer_that_writes_is_not_the_one_that_takes_back():
    def table(*values: float) -> pd.DataFrame:
        return pd.DataFrame({"layer": range(len(values)), "writer": "mlp", "value": values})

    assert written_at(table(1.0, 500.0, 2.0, -900.0)) == 1
    assert written_at(table(1.0, -500.0, 2.0, 400.0)) == 1
    assert written_at(table(900.0, -500.0, -900.0, 10.0)) == 0


# ---- who reads


def test_shares_of_all_channels_sum_to_one(prepared: dict[str, LoadedModel]):
    loaded = prepared["qwen2_moe"]
    every = [writers.reads(loaded, WINDOW[:3], 2, channel) for channel in range(CHANNELS)]
    for column in ("share", "input"):
        total = torch.tensor([table[column].tolist() for table in every]).sum(0)
        assert_near(total, torch.ones(len(total)))


def test_a_reader_s_share_is_by_hand(prepared: dict[str, LoadedModel]):
    loaded = prepared["qwen2"]
    table = writers.reads(loaded, WINDOW, TOKEN, CHANNEL).set_index(["layer", "linear"])
    seen = dict(inside.walked(loaded, WINDOW, "input_norm", "post_attention_norm"))[1]
    for linear, site in (("k_proj", "input_norm"), ("up_proj", "post_attention_norm")):
        weight = dict(loaded.layers[1].named_modules())[
            f"self_attn.{linear}" if site == "input_norm" else f"mlp.{linear}"
        ].weight
        x = seen[site][TOKEN]
        y, own = weight @ x, weight[:, CHANNEL] * x[CHANNEL]
        row = table.loc[(1, linear)]
        assert row["share"] == pytest.approx(float(y @ own) / float(y @ y))
        assert row["size"] == pytest.approx(float(own.norm() / y.norm()))
        assert row["input"] == pytest.approx(float(x[CHANNEL] ** 2 / x.square().sum()))


def test_a_linear_that_does_not_read_a_channel_has_no_share_of_it():
    loaded = tiny_model()
    surgery.prepare(loaded)
    loaded.layers[1].mlp.up_proj.weight[:, CHANNEL] = 0
    table = writers.reads(loaded, WINDOW, TOKEN, CHANNEL)
    blind = table["share"] == 0
    assert table[blind][["layer", "linear"]].to_numpy().tolist() == [[1, "up_proj"]]


def test_of_experts_those_of_the_token_read(prepared: dict[str, LoadedModel]):
    loaded = prepared["mixtral"]
    table = writers.reads(loaded, WINDOW, TOKEN, CHANNEL)
    for number, seen in inside.walked(loaded, WINDOW, "post_attention_norm"):
        chosen = loaded.layers[number].mlp.gate(seen["post_attention_norm"][TOKEN][None])[2][0].tolist()
        own = table[(table["layer"] == number) & table["linear"].str.startswith("experts")]["linear"]
        assert set(own) == {f"experts.{n}.{name}" for n in chosen for name in ("gate_proj", "up_proj")}


# ---- refusals, and a model read layer by layer


def test_a_model_read_layer_by_layer_has_the_same_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of("llama", tmp_path / "m")
    found: list[tuple[pd.DataFrame, ...]] = []
    for memory in ("", "0"):
        monkeypatch.setenv(checkpoint.MEMORY, memory)
        loaded = load(folder)
        assert (loaded.checkpoint is not None) == (memory == "0")
        surgery.prepare(loaded)
        at = loaded, WINDOW, TOKEN
        direction = writers.one_hot(CHANNEL, CHANNELS)
        own = writers.writes(*at, direction), writers.neurons(*at, CHANNEL, 1), writers.reads(*at, CHANNEL)
        found.append((*own, writers.behind(*at, 1, 3, "up")))
    for one, other in zip(*found, strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_what_cannot_be_split_is_refused_in_words(tmp_path: Path, prepared: dict[str, LoadedModel]):
    direction = writers.one_hot(0, CHANNELS)
    plain = tiny_model()
    with pytest.raises(
        ValueError, match=r"norms must be fused \(surgery.prepare\) before .*; got norms with gains"
    ):
        writers.writes(plain, WINDOW, 0, direction)
    with pytest.raises(
        ValueError, match=r"must be one whose layers add what .*, no norm; got Olmo2ForCausalLM"
    ):
        writers.reads(ready("olmo2", tmp_path), WINDOW, 0, 0)
    loaded = prepared["llama"]
    with pytest.raises(ValueError, match="channel must be from 0 to 63; got 64"):
        writers.reads(loaded, WINDOW, 0, 64)
    with pytest.raises(ValueError, match="token must be from 0 to 23; got 24"):
        writers.writes(loaded, WINDOW, 24, direction)
    with pytest.raises(ValueError, match="before must be from 1 to 3; got 4"):
        writers.writes(loaded, WINDOW, 0, direction, before=4)
    with pytest.raises(ValueError, match="part must be gate or up; got 'down'"):
        writers.behind(loaded, WINDOW, 0, 1, 0, "down")
    for case in ("mixtral", "opt"):
        with pytest.raises(
            ValueError, match=r"with a gate in its MLP, and without experts; got .*ForCausalLM"
        ):
            writers.behind(prepared[case], WINDOW, 0, 1, 0, "gate")
