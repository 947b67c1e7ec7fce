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
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import (
    MASSIVE_RULES,
    PAPER_RULE,
    RELEASED_KEEP_OUT,
    ROW_RULES,
    CaptureSpec,
    CorpusSpec,
    RotationSpec,
)

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
                "spec": CaptureSpec().plain(),
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


@pytest.mark.parametrize("rule", ["sun", "ratio_8", "ratio_64", "nr_error_8.5"])
def test_a_model_without_massive_tokens_has_none(tmp_path, text_file, store, rule):
    assert not massive.find(planted(tmp_path, text_file, store, plant=False), rule).any()


# ---- thresholds


def test_sun_needs_more_than_100_and_at_least_1000_medians(store):
    largest = [[100.0, 100.5, 5000.0], [1999.0, 2000.0, 2001.0], [150.0, 199.9, 200.0]]
    found = massive.find(handmade(store, largest, [0.01, 2.0, 0.2]), "sun")
    assert found.tolist() == [[False, True, True], [False, True, True], [False, False, True]]


@pytest.mark.parametrize("factor", [8, 64])
def test_ratio_needs_more_than_that_many_medians_of_the_tokens_maxima(store, factor):
    largest = [[1.0, 1.0, 1.0, 1.0 * factor, factor + 0.5], [2.0, 2.0, 2.0, 2.0 * factor, 2.0 * factor + 0.5]]
    found = massive.find(handmade(store, largest, [1.0, 1.0]), f"ratio_{factor}")
    assert found.tolist() == [[False, False, False, False, True]] * 2


def slow_ratio(found: Capture, factor: float) -> list[list[bool]]:
    """The rule as it is said: a token's largest |a| before a norm against the median token's there."""
    verdicts = []
    for site in found.residual_max.tolist():
        middle = sorted(site)[(len(site) - 1) // 2]  # the lower of two middle ones, as torch's
        verdicts.append([largest > factor * middle for largest in site])
    return verdicts


@pytest.mark.parametrize("factor", [8, 64])
def test_ratio_is_its_definition_on_any_maxima(store, factor):
    draws = torch.randn(5, 60, generator=torch.Generator().manual_seed(0)).mul(2.5).exp()
    found = handmade(store, draws.tolist(), [1.0] * 5)
    mask = massive.find(found, f"ratio_{factor}")
    assert 0 < int(mask.sum()) < 150
    assert mask.tolist() == slow_ratio(found, factor)


def test_the_number_in_a_rules_name_is_its_threshold():
    numbers = {rule: massive.threshold(rule) for rule in MASSIVE_RULES if rule[-1].isdigit()}
    assert numbers == {"ratio_8": 8, "ratio_64": 64, "nr_error_8.5": 8.5, "nr_error_9.5": 9.5}


@pytest.mark.parametrize("channels", [64, 576, 4096])
@pytest.mark.parametrize("root", [8.5, 9.5])
def test_nr_error_threshold_scales_with_the_root_of_the_channels(channels, root):
    row = torch.randn(1, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row *= (
        root * (channels / 4096) ** 0.5 / squared_error(row, SYM4).sqrt()
    )  # its root error is now the threshold
    rows = torch.cat([row * (1 - 1e-6), row * (1 + 1e-6)])
    assert massive.rows_rule(rows, f"nr_error_{root}").tolist() == [True, False]


def test_the_released_codes_two_thresholds_differ():
    assert (PAPER_RULE, RELEASED_KEEP_OUT) == ("nr_error_8.5", "nr_error_9.5")
    row = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    row *= 9.0 / squared_error(row, SYM4).sqrt()
    assert not massive.rows_rule(row, PAPER_RULE).any()
    assert massive.rows_rule(row, RELEASED_KEEP_OUT).all()


def test_ro_vs_nr_compares_with_the_seed_0_rotation():
    R = make(RotationSpec(kind="RO", seed=0), 64).float()
    one_hot = torch.eye(64)[:5] * 8
    assert massive.rows_rule(one_hot, "ro_vs_nr").all()  # on the grid already, off it once rotated
    assert not massive.rows_rule(one_hot @ R.T, "ro_vs_nr").any()  # the other way round
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    expected = squared_error(x @ R, SYM4) >= squared_error(x, SYM4)
    assert torch.equal(massive.rows_rule(x, "ro_vs_nr"), expected)
    assert 0 < int(expected.sum()) < 200


@pytest.mark.parametrize("rule", ROW_RULES)
def test_rows_may_have_more_dimensions_and_another_dtype(rule):
    x = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::7] = torch.eye(64)[:5] * 8
    flat = massive.rows_rule(x.reshape(60, 64), rule)
    assert torch.equal(massive.rows_rule(x, rule).flatten(), flat)
    assert torch.equal(massive.rows_rule(x.double(), rule).flatten(), flat)


@pytest.mark.parametrize("rule", ROW_RULES)
def test_rows_of_16_bits_are_judged_as_the_numbers_they_are(rule):
    """Near the threshold, where a sum of squares in 16 bits would put many on the other side."""
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))
    if rule != "ro_vs_nr":
        wanted = massive.threshold(rule) * (64 / 4096) ** 0.5
        x *= (wanted / squared_error(x, SYM4).sqrt() * torch.linspace(0.995, 1.005, 3000))[:, None]
    for dtype in (torch.float16, torch.bfloat16):
        short = x.to(dtype)
        assert torch.equal(massive.rows_rule(short, rule), massive.rows_rule(short.float(), rule))
    assert 0 < int(massive.rows_rule(x, rule).sum()) < 3000


# ---- bad input, table


def test_an_unknown_rule_is_refused_with_the_choices(store):
    found = handmade(store, [[1.0, 2.0]], [1.0])
    with pytest.raises(ValueError, match=rf"rule must be one of {', '.join(MASSIVE_RULES)}; got 'mass'"):
        massive.find(found, "mass")
    for rule in ("sun", "ratio_8", "ratio_64", "nr_error", "mass"):
        said = rf"rule must be one of {', '.join(ROW_RULES)} for rows alone .*; got '{rule}'"
        with pytest.raises(ValueError, match=said):
            massive.rows_rule(torch.ones(2, 16), rule)
    for rule in (*ROW_RULES, "mass"):
        said = rf"rule must be sun or a ratio for the residual stream; got '{rule}'"
        with pytest.raises(ValueError, match=said):
            massive.residual_rule(found.residual_max, found.residual_median, rule)


# ---- what is odd about a rule


def judged(store: Store, *, grid: int = 0, alone: int = 0, large: int = 0, median: float = 0.1) -> Capture:
    """A capture of 200 tokens at one site. No rule calls its rows massive, but: the first `grid` lie on the
    symmetric grid, which both rules of rows see; the next `alone` only nr_error sees; the first `large`
    tokens have 500 in a residual stream of `median`.
    """
    R = make(RotationSpec(kind="RO", seed=0), 64).float()
    rows = 72 * torch.eye(64).repeat(4, 1)[:200] @ R.T
    rows[:grid] = 8 * torch.eye(64)[:grid]
    rows[grid : grid + alone] /= 9
    largest = [500.0 if token < large else 1.0 for token in range(200)]
    return handmade(store, [largest], [median], rows)


ODD = [
    ({}, "sun", "no token is massive by sun: there is none to look at, and gamma has no effect"),
    ({"large": 4}, "ratio_8", None),
    (
        {"large": 5},
        "ratio_8",
        "rule ratio_8 marks 5 rows, 2.5% of all: more than rare tokens; look at the others",
    ),
    ({"grid": 2}, "nr_error_8.5", None),
    ({"alone": 3}, "nr_error_8.5", "rule nr_error_8.5 marks 3 rows, 3 of which no other rule calls massive"),
    (
        {"grid": 1, "alone": 2},
        "nr_error_8.5",
        "rule nr_error_8.5 marks 3 rows, 2 of which no other rule calls massive",
    ),
    ({"grid": 2, "alone": 2}, "nr_error_8.5", None),
    ({"alone": 3, "large": 3}, "nr_error_9.5", None),
    (
        {"large": 2, "median": 1.0},
        "ratio_64",
        "rule ratio_64 marks 2 rows, 2 of which no other rule calls massive",
    ),
    ({"large": 2, "grid": 1, "median": 1.0}, "ratio_64", None),
]


@pytest.mark.parametrize(("tokens", "rule", "said"), ODD)
def test_doubt_says_none_too_many_or_what_no_other_rule_finds(store, tokens, rule, said):
    assert massive.doubt(judged(store, **tokens), rule) == said


def test_a_doubt_is_said_once(store, caplog):
    massive._warn_once.cache_clear()  # what an earlier test said of the same capture
    found = judged(store, alone=3)
    for rule in ("sun", "nr_error_8.5", "sun", "nr_error_8.5", "ro_vs_nr"):
        massive.warn(found, rule)
    massive.warn(Capture(found.artefact), "sun")
    assert [record.getMessage() for record in caplog.records] == [
        massive.doubt(found, rule) for rule in ("sun", "nr_error_8.5", "ro_vs_nr")
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    massive.warn(judged(store, large=2), "ratio_8")
    assert len(caplog.records) == 3


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
    assert by_token.loc[3, ["sun", "ratio_8", "ratio_64", "nr_error_8.5"]].tolist() == [
        False,
        True,
        True,
        False,
    ]
