"""Token errors: against a direct loop, and the paper's ordering for a massive row, RO > NR > RH."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from again import FLOAT64, assert_near
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture, capture
from dfrot_lab.observe.errors import (
    default_rotations,
    massive_names,
    massive_values,
    orders,
    summary,
    token_errors,
    wide,
)
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import (
    DEFAULT_RULE,
    MASSIVE_RULES,
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    RotationSpec,
)

SYM4, ASYM4, SYM8 = QuantSpec(), QuantSpec(scheme="asymmetric"), QuantSpec(bits=8)
TOKENS = 100


@pytest.fixture
def recorded(tiny_spec: ModelSpec, text_file: Path, store: Store) -> Capture:
    return capture(
        CaptureSpec(
            model=tiny_spec, corpus=CorpusSpec(name=str(text_file), split="calibration"), tokens=TOKENS
        ),
        store,
    )


def custom(channels: int) -> Tensor:
    return rotations.make(RotationSpec(kind="RO", seed=77), channels) @ rotations.make(
        RotationSpec(kind="RH", seed=78), channels
    )


# ---- against a loop


@pytest.mark.parametrize(
    "sites",
    [None, ["layers.1.input_norm"], ["layers.1.post_attention_norm", "layers.0.input_norm"]],
    ids=["all", "1", "2"],
)
def test_token_errors_equal_a_direct_loop(recorded: Capture, sites: list[str] | None):
    matrices = {**default_rotations(64, seed=3), "mine": custom(64)}
    quantizers = (SYM4, ASYM4, SYM8)
    table = token_errors(recorded, matrices, quantizers, sites=sites)
    assert list(table.columns) == [
        "site",
        "token",
        "text",
        "rotation",
        "quantizer",
        "error",
        "root",
        "massive",
    ]
    expected = []
    for site in sites or recorded.sites:
        x = recorded.rows(site)
        for name, R in matrices.items():
            for quantizer in quantizers:
                for token in range(TOKENS):
                    rotated = x[token : token + 1].double() @ R
                    error = float((rotated - fake_quantize(rotated, quantizer)).square().sum())
                    expected.append((site, token, recorded.texts[token], name, quantizer.name, error))
    assert len(table) == len(expected)
    for column, values in zip(
        ["site", "token", "text", "rotation", "quantizer"], zip(*expected, strict=True), strict=False
    ):
        assert table[column].tolist() == list(values)
    # A value at the border of two codes may round the other way in float32 than in float64: its error is the
    # same to first order.
    np.testing.assert_allclose(table["error"], [row[-1] for row in expected], rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(table["root"] ** 2, table["error"], rtol=1e-5, atol=1e-12)


def test_defaults_are_nr_ro_rh_at_symmetric_4_bits(recorded: Capture):
    table = token_errors(recorded)
    assert table["rotation"].unique().tolist() == ["NR", "RO", "RH"]
    assert table["quantizer"].unique().tolist() == ["sym4"]
    assert table["site"].unique().tolist() == recorded.sites
    assert len(table) == 3 * len(recorded.sites) * TOKENS


def test_default_rotations_are_the_specs_own(recorded: Capture):
    found = default_rotations(64, seed=5)
    assert list(found) == ["NR", "RO", "RH"]
    for kind, R in found.items():
        assert_near(R, rotations.make(RotationSpec(kind=kind, seed=5), 64), FLOAT64)


def test_16_bits_have_no_error(recorded: Capture):
    assert (token_errors(recorded, quantizers=(QuantSpec(bits=16),))["error"] == 0).all()


def test_an_unknown_site_is_named(recorded: Capture):
    with pytest.raises(KeyError, match=r"no site 'layers\.9\.input_norm'"):
        token_errors(recorded, sites=["layers.9.input_norm"])


def test_an_unknown_rule_is_refused(recorded: Capture):
    with pytest.raises(ValueError, match=r"rule must be one of .*; got 'big'"):
        token_errors(recorded, rule="big")


# ---- massive tokens in the table


@pytest.mark.parametrize("rule", MASSIVE_RULES)
def test_massive_column_is_the_verdict_of_one_rule(recorded: Capture, rule: str):
    table = token_errors(recorded, {"NR": torch.eye(64)}, sites=recorded.sites[2:], rule=rule)
    mask = massive.find(recorded, rule)
    assert table["massive"].dtype == bool and set(table["massive"]) == {True, False}
    for row in table.itertuples():
        assert row.massive == bool(mask[recorded.sites.index(row.site), row.token])


def test_the_rule_of_the_massive_column_is_the_default_one(recorded: Capture):
    table = token_errors(recorded, {"NR": torch.eye(64)})
    mask = massive.find(recorded, DEFAULT_RULE)
    assert table["massive"].tolist() == mask.flatten().tolist()


def test_massive_names_joins_the_rules_that_mark_a_token(recorded: Capture):
    masks = {rule: massive.find(recorded, rule) for rule in MASSIVE_RULES}
    names = massive_names(recorded)
    assert names.shape == (len(recorded.sites), TOKENS)
    for site, token in np.ndindex(names.shape):
        marking = [rule for rule in MASSIVE_RULES if masks[rule][site, token]]
        assert names[site, token] == ", ".join(marking)
    assert {"", ", ".join(MASSIVE_RULES)} <= set(names.flatten())
    one = massive_names(recorded, sites=recorded.sites[1:2])
    assert one.tolist() == names[1:2].tolist()


def test_wide_has_one_column_a_rotation(recorded: Capture):
    table = token_errors(recorded)
    spread = wide(table)
    assert list(spread.columns) == ["site", "token", "text", "massive", "NR", "RO", "RH"]
    assert len(spread) == len(recorded.sites) * TOKENS
    for rotation in ("NR", "RO", "RH"):
        part = table[table["rotation"] == rotation].set_index(["site", "token"])["error"]
        pd.testing.assert_series_equal(
            spread.set_index(["site", "token"])[rotation],
            part,
            check_names=False,
            check_index_type=False,
            check_dtype=False,
        )
    assert np.allclose(wide(table, "root")["RO"] ** 2, spread["RO"], rtol=1e-5)


def test_wide_takes_one_quantizer(recorded: Capture):
    with pytest.raises(
        ValueError, match=r"errors must hold one quantizer to be widened; got \['asym4', 'sym4'\]"
    ):
        wide(token_errors(recorded, quantizers=(SYM4, ASYM4)))


def test_wide_refuses_two_rows_in_one_place(recorded: Capture):
    """Two quantizers may not be averaged, nor anything else."""
    table = token_errors(recorded)
    with pytest.raises(ValueError, match="duplicate"):
        wide(pd.concat([table, table.iloc[:1].assign(error=3.0)]))


def test_summary_splits_massive_from_ordinary_tokens(recorded: Capture):
    table = token_errors(recorded, quantizers=(SYM4, ASYM4))
    found = summary(table)
    assert list(found.columns) == ["quantizer", "rotation", "tokens", "rows", "mean", "median", "p99"]
    assert len(found) == 2 * 3 * 2
    for row in found.itertuples():
        marked = table["massive"] == (row.tokens == "massive")
        roots = table[(table["quantizer"] == row.quantizer) & (table["rotation"] == row.rotation) & marked][
            "root"
        ]
        assert row.rows == len(roots) > 0
        assert (row.mean, row.median, row.p99) == pytest.approx(
            (roots.mean(), roots.median(), roots.quantile(0.99)), rel=1e-5
        )


def test_massive_values_are_the_row_before_and_after_quantization(recorded: Capture):
    site, token = "layers.1.input_norm", recorded.texts.index("\n")
    matrices = default_rotations(64)
    table = massive_values(recorded, site, token, matrices)
    assert list(table.columns) == ["rotation", "channel", "value", "quantized"]
    row = recorded.rows(site)[token]
    for name, R in matrices.items():
        part = table[table["rotation"] == name]
        assert part["channel"].tolist() == list(range(64))
        np.testing.assert_allclose(part["value"], (row.double() @ R).numpy(), rtol=1e-4, atol=1e-5)
        error = ((part["value"] - part["quantized"]) ** 2).sum()
        assert error == pytest.approx(
            float(squared_error((row.double() @ R)[None], SYM4)), rel=1e-3, abs=1e-6
        )


# ---- the paper's claim


def roots(x: Tensor, kind: str, seed: int) -> Tensor:
    return squared_error(x @ rotations.make(RotationSpec(kind=kind, seed=seed), x.shape[1]), SYM4).sqrt()


@pytest.mark.parametrize("channels", [64, 576])
@pytest.mark.parametrize("seed", range(5))
def test_a_pure_spike_has_no_error_under_hadamard(channels: int, seed: int):
    """sqrt(C) e_i becomes a row of +-1, which is on the symmetric grid; a random orthogonal matrix makes a
    Gaussian row of it.
    """
    spikes = torch.eye(channels, dtype=torch.float64)[::7] * channels**0.5
    assert roots(spikes, "RH", seed).max() < 1e-12
    assert roots(spikes, "NR", seed).max() < 1e-12
    assert roots(spikes, "RO", seed).min() > 0.08 * channels**0.5


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_among_small_values_orders_ro_nr_rh(seed: int):
    """Values of 0.115 beside a spike of 24, as in token 0 of the default model: its measured roots are 2.77
    (NR), about 3 (RO) and 1.3 (RH).
    """
    x = 0.115 * torch.randn(20, 576, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[torch.arange(20), torch.arange(20) * 7] = 24
    nr, ro, rh = (roots(x, kind, seed).mean() for kind in ("NR", "RO", "RH"))
    assert ro > nr > rh
    assert (float(nr), float(rh)) == pytest.approx((2.77, 1.3), rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_ordinary_rows_differ_little_between_ro_and_rh(seed: int):
    x = torch.randn(200, 576, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert float(roots(x, "RO", seed).mean() / roots(x, "RH", seed).mean()) == pytest.approx(1, abs=0.02)


def test_massive_tokens_of_the_tiny_model_prefer_hadamard(recorded: Capture):
    spread = wide(token_errors(recorded))
    marked = spread[spread["massive"]]
    assert len(marked) > 5
    assert (marked["RH"] < marked["RO"]).mean() > 0.9


# ---- orders


def slow_orders(table: pd.DataFrame, names: tuple[str, ...]) -> list[str]:
    """Row by row: take the largest that is left, the first named of equal ones."""
    found = []
    for _, row in table.iterrows():
        left, order = list(names), []
        while left:
            order.append(max(left, key=lambda name: row[name]))  # max keeps the first of equal ones
            left.remove(order[-1])
        found.append(" > ".join(order))
    return found


@pytest.mark.parametrize(
    "names", [("NR", "RO", "RH"), ("RO", "RH"), ("RH", "NR", "RO", "DFRot")], ids="-".join
)
def test_orders_are_those_of_a_row_by_row_sort(names: tuple[str, ...]):
    """Errors of few values, so that equal ones are frequent."""
    errors = np.random.default_rng(0).integers(0, 4, (300, 4)).astype(np.float32)
    table = pd.DataFrame(errors, columns=["NR", "RO", "RH", "DFRot"], index=range(1000, 1300))
    found = orders(table, names)
    assert found.tolist() == slow_orders(table, names)
    assert found.index.equals(table.index)


def test_equal_errors_keep_the_order_of_the_names():
    table = pd.DataFrame({"RH": [1.0, 2.0, 1.0], "NR": [1.0, 2.0, 0.0], "RO": [1.0, 3.0, 1.0]})
    assert orders(table).tolist() == ["NR > RO > RH", "RO > NR > RH", "RO > RH > NR"]
    assert orders(table, ("RH", "RO", "NR")).tolist() == ["RH > RO > NR", "RO > RH > NR", "RH > RO > NR"]


def test_massive_tokens_have_the_papers_order_and_ordinary_ones_another(recorded: Capture):
    table = wide(token_errors(recorded))
    order = orders(table)
    heavy = table["massive"]
    assert heavy.any() and set(order[heavy]) == {"RO > RH > NR"}, set(order[heavy])
    assert (order[~heavy].str.startswith("NR")).mean() > 0.9
