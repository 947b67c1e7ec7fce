"""MXFP4 and NVFP4: every element against the list of E2M1's numbers, scales against the formats' own words,
and what a format is refused for."""

import itertools
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.maths import block_floats
from dfrot_lab.maths.quantizers import fake_quantize, quantize, squared_error
from dfrot_lab.recipe.grids import BLOCK_FLOATS, QuantSpec, of_scheme
from dfrot_lab.recipe.specs import CorpusSpec, Recipe, RotationSpec, recipe_of
from dfrot_lab.score import perplexity
from dfrot_lab.score.build import is_integer

NUMBERS = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # of E2M1 by code; the even codes end in a 0 bit


def nearest(value: float) -> float:
    """The E2M1 number next to `value`, by trying all; of two the one of the even code."""
    size = abs(value)
    code = min(range(8), key=lambda code: (abs(NUMBERS[code] - size), code % 2))
    return math.copysign(NUMBERS[code], value)


def by_hand(x: torch.Tensor, scheme: str) -> torch.Tensor:
    """A slow loop over blocks, in float64 but for NVFP4's scale of 8 bits."""
    size, out = BLOCK_FLOATS[scheme], torch.empty_like(x)
    blocks, results = x.reshape(-1, size), out.reshape(-1, size)
    common = float(x.abs().max()) / (448 * 6)
    for block, result in zip(blocks, results, strict=True):
        largest = float(block.abs().max())
        if scheme == "mxfp4":
            scale = 2.0 ** (math.floor(math.log2(largest)) - 2) if largest else 1.0
        else:
            own = max(largest / (6 * common), 2**-9)  # E4M3's smallest number
            scale = common * float(torch.tensor(own).to(torch.float8_e4m3fn).float())
        result.copy_(torch.tensor([scale * nearest(float(value) / scale) for value in block]))
    return out


def test_every_element_is_the_nearest_number_and_ties_go_to_the_even_code():
    edges = [(a + b) / 2 for a, b in itertools.pairwise(NUMBERS)]
    values = [*NUMBERS, *edges, *(edge + step for edge in edges for step in (1e-4, -1e-4)), 6.9, 7.0, 1e9]
    values = torch.tensor([*values, *(-value for value in values)])
    expected = torch.tensor([nearest(float(value)) for value in values])
    torch.testing.assert_close(block_floats.e2m1(values), expected, rtol=0, atol=0)
    assert block_floats.e2m1(torch.tensor([2.5, 3.5, 5.0, 0.25, 0.75])).tolist() == [2, 4, 4, 0, 1]


def test_it_is_the_cast_of_compressed_tensors():
    fp4 = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).mul_(3).clamp_(-6, 6)
    eager = getattr(fp4, "_cast_to_fp4_eager", None) or getattr(fp4, "_cast_to_fp4_torch", None)
    cast = getattr(eager, "__wrapped__", eager) or fp4.cast_to_fp4
    torch.testing.assert_close(block_floats.e2m1(x), cast(x.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", BLOCK_FLOATS)
def test_a_tensor_is_rounded_as_by_hand(scheme):
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[1, 3], x[2, 40:60], x[3, :32] = 300.0, 1e-3, 0.0
    spec = of_scheme(scheme, 4)
    np.testing.assert_allclose(fake_quantize(x, spec), by_hand(x, scheme), rtol=1e-6)
    assert fake_quantize(x.float(), spec).dtype == torch.float32
    torch.testing.assert_close(squared_error(x, spec), (x - fake_quantize(x, spec)).square().sum(-1))


@pytest.mark.parametrize("scheme", BLOCK_FLOATS)
def test_properties(scheme):
    spec = of_scheme(scheme, 4)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    found = fake_quantize(x, spec)
    torch.testing.assert_close(fake_quantize(-x, spec), -found)
    torch.testing.assert_close(fake_quantize(8 * x, spec), 8 * found)  # a power of 2 changes exponents alone
    blocks = found.reshape(-1, BLOCK_FLOATS[scheme])
    assert max(len(block.abs().unique()) for block in blocks) <= 8
    assert not fake_quantize(torch.zeros(2, 64), spec).any()
    assert fake_quantize(torch.full((1, 64), 3.0), spec).allclose(torch.full((1, 64), 3.0), rtol=1e-6)


def test_mxfp4_again_changes_nothing_and_a_spike_spoils_its_own_block_alone():
    spec = of_scheme("mxfp4", 4)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    found = fake_quantize(x, spec)
    torch.testing.assert_close(fake_quantize(found, spec), found, rtol=0, atol=0)
    spiked = x.clone()
    spiked[:, 5] = 1000.0
    again = fake_quantize(spiked, spec)
    torch.testing.assert_close(again[:, 32:], found[:, 32:], rtol=0, atol=0)
    assert not again[:, :5].any() and not again[:, 6:32].any()


def test_the_extremes_of_a_float_have_scales():
    tiny = torch.full((1, 32), 1e-38)
    assert torch.isfinite(fake_quantize(tiny, of_scheme("mxfp4", 4))).all()
    huge = torch.tensor([[3e38] + [0.0] * 31])
    for scheme in BLOCK_FLOATS:
        found = fake_quantize(huge, of_scheme(scheme, 4))
        assert torch.isfinite(found).all() and found[0, 0] > 2e38


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"bits": 8}, "QuantSpec.bits must be 4 with scheme mxfp4"),
        ({"group_size": 16}, "QuantSpec.group_size must be 32 with scheme mxfp4"),
        ({"clip_ratio": 0.9}, "QuantSpec.clip_ratio must be 1 with scheme mxfp4"),
        ({"granularity": "per_token", "group_size": None}, "QuantSpec.granularity must be 'per_group'"),
    ],
)
def test_a_format_is_as_it_is(fields, rule):
    said = {"bits": 4, "scheme": "mxfp4", "granularity": "per_group", "group_size": 32} | fields
    with pytest.raises(ValueError, match=rule):
        QuantSpec(**said)


def test_names_and_codes():
    assert [of_scheme(scheme, 4).name for scheme in (*BLOCK_FLOATS, "asymmetric")] == [
        "mxfp4",
        "nvfp4",
        "asym4",
    ]
    with pytest.raises(
        ValueError, match=r"QuantSpec.scheme must be a grid's where codes are asked for; got mxfp4"
    ):
        quantize(torch.ones(1, 32), of_scheme("mxfp4", 4))
    with pytest.raises(ValueError, match="group_size must divide the last dimension 40; got 32"):
        fake_quantize(torch.ones(1, 40), of_scheme("mxfp4", 4))


@pytest.mark.parametrize("scheme", BLOCK_FLOATS)
def test_a_recipe_of_floats_is_scored_and_is_not_an_integer_product(scheme, tiny_spec, text_file, store):
    of = {"model": tiny_spec, "corpus": CorpusSpec(name=str(text_file)), "windows": 1, "window": 64}
    plain = recipe_of("4-4-16", rotation=RotationSpec(kind="RH"), weights="rtn", **of)
    spec = plain.with_(activations=of_scheme(scheme, 4))
    assert not is_integer(spec) and Recipe.from_yaml(spec.to_yaml()) == spec
    found, whole = (
        perplexity.evaluate(each, store) for each in (spec, plain.with_(activations=QuantSpec(bits=16)))
    )
    assert np.isfinite(found.losses).all() and not np.allclose(found.losses, whole.losses)


def test_the_command_line_takes_them(tiny_spec, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    of = ["--model", tiny_spec.source, "--corpus", str(text_file)]
    result = CliRunner().invoke(app, ["errors", *of, "--tokens", "64", "--scheme", "mxfp4"])
    assert result.exit_code == 0 and "mxfp4" in result.output, result.output
    said = [*of, "--window", "64", "--windows", "1", "--bits", "16-4-16", "--acts", "nvfp4"]
    result = CliRunner().invoke(app, ["evaluate", *said])
    assert result.exit_code == 0, result.output
    wrong = CliRunner().invoke(app, ["evaluate", *said, "--bits", "16-8-16"])
    assert wrong.exit_code == 1 and "QuantSpec.bits must be 4 with scheme nvfp4; got 8" in wrong.output
