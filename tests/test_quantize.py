"""Quantizers: against a slow loop written from the formulas, and the properties that the paper and refinement
lean on.
"""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor

from dfrot_lab.maths import quantizers as module
from dfrot_lab.maths.quantizers import (
    clip_search,
    code_range,
    dequantize,
    fake_quantize,
    grouped,
    quantize,
    squared_error,
)
from dfrot_lab.model import integer
from dfrot_lab.recipe.grids import SCHEMES, QuantSpec

SYM, ASYM, FREE = (QuantSpec(bits=4, scheme=scheme) for scheme in SCHEMES)
SPECS = [
    QuantSpec(bits=bits, scheme=scheme, clip_ratio=clip)
    for bits, scheme, clip in itertools.product(range(2, 9), SCHEMES, (1.0, 0.83))
    if scheme != "free" or bits in (2, 4, 8)
]
GRANULARITIES = [
    {"granularity": "per_token"},
    {"granularity": "per_channel"},
    {"granularity": "per_group"},
    {"granularity": "per_group", "group_size": 8},
    {"granularity": "per_tensor"},
]


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slow(values: list[float], spec: QuantSpec) -> tuple[list[int], float, int]:
    """Codes, scale and zero of values that share one scale, one value at a time (Python's round is half to
    even, as torch's).
    """
    if spec.symmetric:
        low, high, zero = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1, 0
        scale = spec.clip_ratio * max(abs(v) for v in values) / high or 1.0
    else:
        low, high = 0, 2**spec.bits - 1
        if spec.scheme == "free":
            cut = (max(values) - min(values)) * (1 - spec.clip_ratio) / 2
            smallest, largest = min(values) + cut, max(values) - cut
            scale = (largest - smallest) / high or abs(smallest) or 1.0
            zero = -round(smallest / scale)
            return [min(max(round(v / scale) + zero, low), high) for v in values], scale, zero
        smallest, largest = spec.clip_ratio * min(0.0, *values), spec.clip_ratio * max(0.0, *values)
        scale = (largest - smallest) / high or 1.0
        zero = -round(smallest / scale)
    return [min(max(round(v / scale) + zero, low), high) for v in values], scale, zero


def eq5(values: list[float], bits: int) -> list[float]:
    """Eq. 5 as printed: the range is the row's own minimum to maximum."""
    scale = (max(values) - min(values)) / (2**bits - 1)
    zero = -round(min(values) / scale)
    return [scale * (min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) for v in values]


# ---- against the slow loop


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: "-".join(map(str, g.values())))
def test_codes_scales_and_values_equal_a_slow_loop(spec, granularity):
    spec = spec.with_(**granularity)
    x = rows(3, 4, 24, seed=spec.bits) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    x[1] += 3  # rows whose minimum is far from -maximum
    groups = {"per_tensor": x.reshape(1, -1), "per_group": x.reshape(-1, spec.group_size or 24)}.get(
        spec.granularity, x.reshape(-1, 24)
    )
    expected = [slow(group.tolist(), spec) for group in groups]
    found = quantize(x, spec)
    assert found.codes.tolist() == [codes for codes, _, _ in expected]
    assert found.zero.flatten().tolist() == [zero for _, _, zero in expected]
    assert found.scale.flatten().tolist() == pytest.approx([scale for _, scale, _ in expected], rel=1e-12)
    values = torch.tensor(
        [[scale * (code - zero) for code in codes] for codes, scale, zero in expected], dtype=torch.float64
    ).reshape(x.shape)
    torch.testing.assert_close(fake_quantize(x, spec), values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(squared_error(x, spec), (x - values).square().sum(-1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("scheme", ["asymmetric", "free"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_and_free_are_equation_5_for_rows_with_both_signs(bits, scheme):
    x = rows(50, 16, seed=bits) + torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
    x = x[(x.amin(1) < 0) & (x.amax(1) > 0)]
    assert len(x) > 40, "too few rows with both signs: the test is vacuous"
    expected = torch.tensor([eq5(row, bits) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(
        fake_quantize(x, QuantSpec(bits=bits, scheme=scheme)), expected, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_free_is_equation_5_for_any_row(bits):
    x = rows(50, 16, seed=bits) + torch.linspace(-40, 40, 50, dtype=torch.float64)[:, None]
    assert ((x.amin(1) > 0) | (x.amax(1) < 0)).sum() > 40, "too few rows of one sign: the test is vacuous"
    expected = torch.tensor([eq5(row, bits) for row in x.tolist()], dtype=torch.float64)
    found = fake_quantize(x, QuantSpec(bits=bits, scheme="free"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_asymmetric_range_always_includes_zero():
    x = rows(4, 16).abs() + 5
    for values in (x, -x):
        quantized = quantize(values, ASYM)
        assert bool(((quantized.zero >= 0) & (quantized.zero <= 15)).all())
        extreme = values.abs().amax(1, keepdim=True)
        torch.testing.assert_close(quantized.scale, extreme / 15)


# ---- properties


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@given(power=st.integers(-40, 40), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_scale_equivariant_to_the_bit_for_powers_of_two(spec, power, seed):
    x = rows(5, 16, seed=seed, dtype=torch.float32)
    assert torch.equal(fake_quantize(x * 2.0**power, spec), fake_quantize(x, spec) * 2.0**power)


@pytest.mark.parametrize("spec", [SYM, ASYM, FREE], ids=lambda spec: spec.name)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_scale_equivariant_for_any_factor(spec, factor, seed):
    x = rows(5, 16, seed=seed)
    torch.testing.assert_close(
        fake_quantize(x * factor, spec), fake_quantize(x, spec) * factor, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: "-".join(map(str, g.values())))
def test_symmetric_unclipped_is_idempotent(bits, granularity):
    spec = QuantSpec(bits=bits, **granularity)
    once = fake_quantize(rows(20, 32, seed=bits, dtype=torch.float32), spec)
    torch.testing.assert_close(fake_quantize(once, spec), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_decreases_with_bits(scheme):
    x = rows(200, 64)
    errors = [float(squared_error(x, QuantSpec(bits=bits, scheme=scheme)).mean()) for bits in range(2, 17)]
    assert all(more < 0.6 * fewer for fewer, more in itertools.pairwise(errors)), (
        errors
    )  # each bit halves the step: a quarter of the square
    assert errors[-1] == 0


@given(
    bits=st.integers(2, 15),
    scheme=st.sampled_from(["symmetric", "asymmetric", "free"]),
    values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
)
@settings(max_examples=200, deadline=None)
def test_no_value_moves_by_more_than_half_a_step(bits, scheme, values, magnitude):
    """For any row, however large or small: what makes E(x) a rounding error and nothing else."""
    x = torch.tensor([values], dtype=torch.float32) * magnitude
    assume(not x.any() or x.abs().max() > 1e-34)  # below that the step itself is not a normal float32
    spec = QuantSpec(bits=bits, scheme=scheme)
    quantized = quantize(x, spec)
    error = (fake_quantize(x, spec).double() - x.double()).abs()
    slack = 1e-5 + 2.0 ** (bits - 22)  # x / step is known to float32's 24 bits
    own = 4e-7 * x.abs().max()  # a free zero point may be far from 0: the value itself is known to 24 bits
    assert bool((error <= quantized.scale.double() * (0.5 + slack) + (scheme == "free") * own).all())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_rows_of_zeros_stay_zeros(spec):
    x = torch.zeros(3, 8)
    assert torch.equal(fake_quantize(x, spec), x)
    assert torch.equal(squared_error(x, spec), torch.zeros(3))
    assert torch.equal(dequantize(quantize(x, spec), x.shape), x)
    assert quantize(x, spec).scale.flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [3.7, -3.7, 1e-20, -1e20])
def test_constant_rows_come_back(scheme, value):
    x = torch.full((2, 8), value)
    torch.testing.assert_close(fake_quantize(x, QuantSpec(scheme=scheme)), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_rows_use_all_codes_when_asymmetric(sign):
    x = sign * torch.arange(16.0)[None]  # 16 values for 16 codes
    torch.testing.assert_close(fake_quantize(x, ASYM), x)
    assert sorted(quantize(x, ASYM).codes.flatten().tolist()) == list(range(16))
    assert squared_error(x, SYM) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_near_the_largest_of_the_dtype_stay_finite(dtype, scheme):
    """In float16 that is 65,504, and the massive activation of the default model is 24,816: max - min must
    not overflow.
    """
    largest = torch.finfo(dtype).max
    x = torch.tensor([[-0.7 * largest, 0.1 * largest, 0.7 * largest]], dtype=dtype)
    found = fake_quantize(x, QuantSpec(scheme=scheme))
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.double() / largest, x.double() / largest, rtol=0, atol=0.06)


@given(signs=st.lists(st.sampled_from([1.0, -1.0]), min_size=16, max_size=16), seed=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_sign_flips_leave_the_symmetric_error_unchanged(signs, seed):
    x, flips = rows(10, 16, seed=seed, dtype=torch.float32), torch.tensor(signs)
    assert torch.equal(fake_quantize(x * flips, SYM), fake_quantize(x, SYM) * flips)
    torch.testing.assert_close(squared_error(x * flips, SYM), squared_error(x, SYM))


def test_sign_flips_change_the_asymmetric_error():
    """Why a QR of a rotation, which flips some columns, is harmless for a symmetric quantizer alone."""
    x, signs = rows(200, 16), torch.tensor([1.0, -1.0]).repeat(8)
    changed = ~torch.isclose(squared_error(x * signs, ASYM), squared_error(x, ASYM))
    assert changed.float().mean() > 0.5  # all but the rows whose two extremes met the same sign


# ---- the free scheme


@given(steps=st.integers(-1000, 1000), bits=st.integers(2, 8), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_an_offset_of_whole_steps_leaves_the_free_error_unchanged(steps, bits, seed):
    """Q(x + c 1) = Q(x) + c 1 where c is a multiple of the row's own step, since the grid goes through 0."""
    spec, x = QuantSpec(bits=bits, scheme="free"), rows(5, 16, seed=seed)
    offset = steps * quantize(x, spec).scale
    found, wanted = fake_quantize(x + offset, spec), fake_quantize(x, spec) + offset
    tie = (x.amin(1, keepdim=True) / quantize(x, spec).scale).frac().abs().sub(0.5).abs() < 1e-9
    assume(not tie.any())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offset", [-1000.0, -7.3, 0.6, 7.3, 1000.0])
def test_any_offset_costs_the_free_scheme_nothing_and_the_asymmetric_one_much(offset):
    """In the mean, not row by row: where a row lies between two points of its grid changes with it."""
    x = rows(4000, 64)
    plain, moved = squared_error(x, FREE).mean(), squared_error(x + offset, FREE).mean()
    assert float(moved / plain) == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(quantize(x + offset, FREE).scale, quantize(x, FREE).scale)
    if abs(offset) > 5:
        assert squared_error(x + offset, ASYM).mean() > 3 * moved


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_free_is_asymmetric_for_rows_of_both_signs_and_never_has_a_larger_step(bits):
    asymmetric, free = (QuantSpec(bits=bits, scheme=scheme) for scheme in ("asymmetric", "free"))
    x = rows(400, 16, seed=bits) + torch.linspace(-4, 4, 400, dtype=torch.float64)[:, None]
    both = (x.amin(1) < 0) & (x.amax(1) > 0)
    assert both.sum() > 100 and (~both).sum() > 100
    assert torch.equal(fake_quantize(x[both], free), fake_quantize(x[both], asymmetric))
    assert bool((quantize(x[~both], free).scale < quantize(x[~both], asymmetric).scale).all())
    assert squared_error(x[~both], free).mean() < 0.7 * squared_error(x[~both], asymmetric).mean()
    worst = 16 * (quantize(x, free).scale.flatten() / 2) ** 2
    assert bool((squared_error(x, free) <= worst * (1 + 1e-9)).all())


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("value", [3.7, -3.7, 1e-20, -1e20, 0.0])
def test_constant_rows_are_exact_in_the_free_scheme(value, clip):
    x = torch.full((2, 8), value)
    spec = FREE.with_(clip_ratio=clip)
    assert torch.equal(fake_quantize(x, spec), x)
    assert torch.equal(dequantize(quantize(x, spec), x.shape), x)


def test_free_clips_about_the_middle_of_the_range():
    x = rows(50, 64) + 30
    spec = FREE.with_(clip_ratio=0.5)
    middle, half = (x.amax(1) + x.amin(1)) / 2, (x.amax(1) - x.amin(1)) / 4
    found, step = fake_quantize(x, spec), quantize(x, spec).scale.flatten()
    torch.testing.assert_close(step, 2 * half / 15)
    assert bool(((found.amax(1) - middle - half).abs() <= step * 0.5001).all())
    assert bool(((middle - half - found.amin(1)).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_free_codes_never_count_as_small_integers(bits):
    """Their zero point may be anywhere, so codes less zero points need not fit int8."""
    spec = QuantSpec(bits=bits, scheme="free")
    assert not integer.fits(spec)
    assert float(quantize(rows(4, 16) + 1000, spec).zero.abs().max()) > 128


# ---- codes


@pytest.mark.parametrize("bits", range(2, 16))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_in_range_and_of_the_smallest_dtype(bits, scheme):
    spec = QuantSpec(bits=bits, scheme=scheme, clip_ratio=0.5)  # clipped, so that both ends are met
    low, high = code_range(spec)
    assert (low, high) == (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if scheme == "symmetric" else (0, 2**bits - 1)
    )
    quantized = quantize(rows(64, 32, dtype=torch.float32), spec)
    assert (int(quantized.codes.min()), int(quantized.codes.max())) == (low, high)
    small = torch.int8 if scheme == "symmetric" else torch.uint8
    assert quantized.codes.dtype == (small if bits <= 8 else torch.int32)
    assert quantized.codes.shape == (64, 32)
    assert quantized.scale.shape == quantized.zero.shape == (64, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_dequantized_codes_are_the_fake_quantized_values_exactly(spec, dtype):
    x = rows(2, 7, 24, seed=1, dtype=dtype)
    for granularity in GRANULARITIES:
        chosen = spec.with_(**granularity)
        found = fake_quantize(x, chosen)
        assert found.dtype == dtype and found.shape == x.shape
        assert torch.equal(dequantize(quantize(x, chosen), x.shape), found)


def test_the_input_is_left_as_it_was():
    x = rows(6, 16)
    before = x.clone()
    for spec in (SYM, ASYM, FREE):
        quantize(x, spec), fake_quantize(x, spec), squared_error(x, spec), clip_search(x, spec)
    assert torch.equal(x, before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_16_bits_leave_the_tensor_alone(scheme):
    spec, x = QuantSpec(bits=16, scheme=scheme), rows(2, 3, 8)
    assert fake_quantize(x, spec) is x
    assert torch.equal(squared_error(x, spec), torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"QuantSpec\.bits must be below 16 to have codes; got 16"):
        quantize(x, spec)


def test_a_group_size_must_divide_the_last_dimension():
    spec = QuantSpec(granularity="per_group", group_size=7)
    for function in (fake_quantize, quantize, squared_error):
        with pytest.raises(
            ValueError, match=r"QuantSpec\.group_size must divide the last dimension 24; got 7"
        ):
            function(rows(2, 24), spec)
    assert grouped(rows(2, 21), spec).shape == (6, 7)


# ---- chunks


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1000, 576), (2, module._CHUNK + 5), (4, 250, 576)], ids=str)
def test_chunks_do_not_matter(scheme, shape):
    spec, x = QuantSpec(scheme=scheme), rows(*shape, dtype=torch.float32)
    assert x.numel() > module._CHUNK, "one chunk would do: the test is vacuous"
    flat = x.reshape(-1, shape[-1])
    assert torch.equal(
        fake_quantize(x, spec).reshape(flat.shape),
        torch.cat([fake_quantize(row[None], spec) for row in flat]),
    )
    torch.testing.assert_close(
        squared_error(x, spec).flatten(), torch.cat([squared_error(row[None], spec) for row in flat])
    )


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: "-".join(map(str, g.values())))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_is_that_of_the_whole_tensor_s_codes_however_many_rows_there_are(scheme, granularity):
    """One long row among a thousand: where a scale is shared by all, every row is on its coarse grid."""
    spec, x = QuantSpec(scheme=scheme, **granularity), rows(1000, 576, dtype=torch.float32)
    x[700] *= 50
    assert x.numel() > module._CHUNK, "one chunk would do: the test is vacuous"
    values = dequantize(quantize(x, spec), x.shape)
    torch.testing.assert_close(squared_error(x, spec), (x - values).square().sum(-1))


def test_clip_search_in_chunks_equals_row_by_row():
    weight = rows(1100, 576, dtype=torch.float32)[:, :512]
    assert weight.numel() > module._CHUNK
    spec = QuantSpec(granularity="per_channel")
    found, one_by_one = clip_search(weight, spec), torch.cat([clip_search(row[None], spec) for row in weight])
    # Of two candidates that lose the same, the sum's last bit chooses.
    torch.testing.assert_close(
        weight_error(weight, found, 4), weight_error(weight, one_by_one, 4), rtol=1e-5, atol=0
    )
    assert (found == one_by_one).double().mean() > 0.99


def test_no_rows_give_no_rows():
    assert fake_quantize(torch.empty(0, 8), ASYM).shape == (0, 8)
    assert squared_error(torch.empty(0, 8), ASYM).shape == (0,)


# ---- clip search


def weight_error(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return (weight - (weight / scale).round().clamp(-half, half - 1) * scale).square().sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clip_search_finds_what_a_slow_search_finds(bits):
    weight = rows(40, 48, seed=bits)
    weight[::4, 3] *= 6  # an outlier in some rows, for which clipping pays
    spec = QuantSpec(bits=bits, granularity="per_channel")
    widest = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    step, count = (0.6 / 29, 30) if bits > 3 else (0.02, 50)  # to 0.4, and to 0.02
    candidates = [widest * (1 - step * i) for i in range(count)]
    least = torch.stack([weight_error(weight, scale, bits) for scale in candidates]).amin(0)
    found = clip_search(weight, spec)
    assert found.shape == (40, 1)
    torch.testing.assert_close(weight_error(weight, found, bits), least, rtol=1e-6, atol=1e-12)
    steps = (1 - found / widest) / step
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)  # one of the candidates


@pytest.mark.parametrize("tail", ["normal", "few large"])
@pytest.mark.parametrize("bits", [2, 3])
def test_no_row_of_few_bits_lies_on_the_edge_of_the_search(bits, tail):
    """The step that loses least is near sigma at 2 bits, so its clip is near sigma over the largest value."""
    weight = rows(100, 576, seed=bits)
    if tail == "few large":
        weight[:, :3] *= 8
    spec = QuantSpec(bits=bits, granularity="per_channel")
    widest = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    found = clip_search(weight, spec)
    if (bits, tail) != (3, "normal"):
        assert (found / widest < 0.39).double().mean() > 0.5, "most are lower than where 4 bits end"
    assert (found / widest > 0.03).all()
    dense = torch.stack([weight_error(weight, widest * i / 500, bits) for i in range(1, 501)]).amin(0)
    assert float(weight_error(weight, found, bits).sum() / dense.sum()) < 1.01


@given(seed=st.integers(0, 10_000), bits=st.integers(2, 8))
@settings(max_examples=40, deadline=None)
def test_clip_search_is_never_worse_than_no_clipping(seed, bits):
    weight = rows(8, 24, seed=seed)
    widest = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    found = clip_search(weight, QuantSpec(bits=bits, granularity="per_channel"))
    assert bool((weight_error(weight, found, bits) <= weight_error(weight, widest, bits) * (1 + 1e-9)).all())


def test_clip_search_leaves_a_row_of_zeros_a_usable_scale():
    assert clip_search(torch.zeros(2, 8), QuantSpec(granularity="per_channel")).gt(0).all()
