"""Massive tokens: every rule marks the planted ones and no other, each rule's threshold is where it says, and
the table shows the verdicts.
"""

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, LAYERS, MASSIVE, save_tiny
from torch import Tensor

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.maths.rotations import make
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture, capture
from dfrot_lab.recipe.specs import MASSIVE_RULES, CaptureSpec, CorpusSpec, QuantSpec, RotationSpec

SYM4 = QuantSpec(bits=4, scheme="symmetric")


def planted(tmp_path: Path, text_file: Path, store: Store, family: str = "llama", **options: bool) -> Capture:
    model = save_tiny(tmp_path / family, family, **options)
    return capture(
        CaptureSpec(model=model, corpus=CorpusSpec(name=str(text_file), split="calibration"), tokens=128),
        store,
    )


def handmade(
    store: Store, abs_max: list[list[float]], median: list[float], rows: Tensor | None = None
) -> Capture:
    """A capture whose residual maxima (sites, tokens) and medians (sites,) are given."""
    largest = torch.tensor(abs_max)
    sites = [f"layers.{i}.input_norm" for i in range(len(largest))]
    rows = torch.ones(largest.shape[1], 16) if rows is None else rows

    def put(writer: Writer) -> None:
        channel = torch.zeros(largest.shape, dtype=torch.int64)
        writer.save_tensors(
            "residual", {"abs_max": largest, "channel": channel, "median": torch.tensor(median)}
        )
        for site in sites:
            writer.save_tensors(site, {"x": rows})
        tokens = range(largest.shape[1])
        writer.save_json(
            "about",
            {
                "sites": sites,
                "channels": rows.shape[1],
                "ids": list(tokens),
                "texts": [f"t{i}" for i in tokens],
            },
        )

    return Capture(store.get_or_make("capture", {"abs_max": abs_max, "median": median}, put))


# ---- the planted models


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", MASSIVE_RULES)
def test_every_rule_marks_exactly_the_newlines(tmp_path, text_file, store, family, rule):
    found = planted(tmp_path, text_file, store, family)
    newline = torch.tensor([text == "\n" for text in found.texts])
    assert 2 <= int(newline.sum()) <= 16
    mask = massive.find(found, rule)
    assert mask.shape == (2 * LAYERS, 128) and mask.dtype == torch.bool
    assert torch.equal(mask, newline.expand(2 * LAYERS, 128)), [
        found.texts[i] for i in (mask != newline).any(0).nonzero()
    ]


@pytest.mark.parametrize("rule", ["sun", "ratio", "nr_error"])
def test_a_model_without_massive_tokens_has_none(tmp_path, text_file, store, rule):
    assert not massive.find(planted(tmp_path, text_file, store, plant=False), rule).any()


# ---- thresholds


def test_sun_needs_more_than_100_and_at_least_1000_medians(store):
    largest = [[100.0, 100.5, 5000.0], [1999.0, 2000.0, 2001.0], [150.0, 199.9, 200.0]]
    found = massive.find(handmade(store, largest, [0.01, 2.0, 0.2]), "sun")
    assert found.tolist() == [[False, True, True], [False, True, True], [False, False, True]]


def test_ratio_needs_more_than_64_medians_of_the_tokens_maxima(store):
    largest = [[1.0, 1.0, 1.0, 64.0, 64.5], [2.0, 2.0, 2.0, 128.0, 128.5]]
    found = massive.find(handmade(store, largest, [1.0, 1.0]), "ratio")
    assert found.tolist() == [[False, False, False, False, True]] * 2


@pytest.mark.parametrize("channels", [64, 576, 4096])
@pytest.mark.parametrize("root", [massive.NR_ERROR_ROOT, massive.KEEP_OUT_ROOT])
def test_nr_error_threshold_scales_with_the_root_of_the_channels(channels, root):
    row = torch.randn(1, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row *= (
        root * (channels / 4096) ** 0.5 / squared_error(row, SYM4).sqrt()
    )  # its root error is now the threshold
    rows = torch.cat([row * (1 - 1e-6), row * (1 + 1e-6)])
    assert massive.rows_rule(rows, "nr_error", root=root).tolist() == [True, False]


def test_nr_error_default_is_refinements_threshold():
    assert (massive.NR_ERROR_ROOT, massive.KEEP_OUT_ROOT) == (8.5, 9.5)
    row = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    row *= 9.0 / squared_error(row, SYM4).sqrt()
    assert not massive.rows_rule(row, "nr_error").any()
    assert massive.rows_rule(row, "nr_error", root=massive.KEEP_OUT_ROOT).all()


def test_ro_vs_nr_compares_with_the_seed_0_rotation():
    R = make(RotationSpec(kind="RO", seed=0), 64).float()
    one_hot = torch.eye(64)[:5] * 8
    assert massive.rows_rule(one_hot, "ro_vs_nr").all()  # on the grid already, off it once rotated
    assert not massive.rows_rule(one_hot @ R.T, "ro_vs_nr").any()  # the other way round
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    expected = squared_error(x @ R, SYM4) >= squared_error(x, SYM4)
    assert torch.equal(massive.rows_rule(x, "ro_vs_nr"), expected)
    assert 0 < int(expected.sum()) < 200


@pytest.mark.parametrize("rule", ["nr_error", "ro_vs_nr"])
def test_rows_may_have_more_dimensions_and_another_dtype(rule):
    x = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::7] = torch.eye(64)[:5] * 8
    flat = massive.rows_rule(x.reshape(60, 64), rule)
    assert torch.equal(massive.rows_rule(x, rule).flatten(), flat)
    assert torch.equal(massive.rows_rule(x.double(), rule).flatten(), flat)


# ---- bad input, table


def test_an_unknown_rule_is_refused_with_the_choices(store):
    found = handmade(store, [[1.0, 2.0]], [1.0])
    with pytest.raises(ValueError, match=r"rule must be one of sun, nr_error, ro_vs_nr, ratio; got 'mass'"):
        massive.find(found, "mass")
    for rule in ("sun", "ratio", "mass"):
        with pytest.raises(
            ValueError, match=rf"rule must be nr_error or ro_vs_nr for rows alone .*; got '{rule}'"
        ):
            massive.rows_rule(torch.ones(2, 16), rule)


def test_table_has_one_row_a_marked_token(tmp_path, text_file, store):
    found = planted(tmp_path, text_file, store)
    table = massive.table(found)
    assert list(table.columns) == [
        "site",
        "token",
        "text",
        "residual_max",
        "channel",
        "median",
        "ratio_to_median",
        *MASSIVE_RULES,
    ]
    newlines = [i for i, text in enumerate(found.texts) if text == "\n"]
    assert list(zip(table["site"], table["token"], strict=True)) == [
        (site, token) for site in found.sites for token in newlines
    ]
    assert set(table["text"]) == {"\n"}
    assert set(table["channel"]) == {max(MASSIVE, key=lambda c: abs(MASSIVE[c]))}
    for row in table.itertuples():
        site = found.sites.index(row.site)
        assert row.residual_max == found.residual_max[site, row.token]
        assert row.median == found.residual_median[site]
        assert row.ratio_to_median == pytest.approx(row.residual_max / row.median, rel=1e-6)
    for rule in MASSIVE_RULES:
        assert table[rule].dtype == bool and table[rule].all()


def test_table_says_which_rule_marks_and_which_does_not(store):
    table = massive.table(
        handmade(
            store,
            [[1.0, 1.0, 1.0, 90.0]],
            [1.0],
            torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 9,
        )
    )
    by_token = table.set_index("token")
    assert by_token.loc[3, ["sun", "ratio", "nr_error"]].tolist() == [False, True, False]
