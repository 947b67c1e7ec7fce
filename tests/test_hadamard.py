"""Hadamard matrices are exact, and the fast transform is the dense product, on every path it can take."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.linalg import hadamard as scipy_hadamard

from dfrot_lab.maths import hadamard
from dfrot_lab.maths.hadamard import factors, hadamard_matrix, hadamard_transform

MODEL_SIZES = {
    64: (64,),  # head size of SmolLM2-135M and Qwen2.5-0.5B (R3)
    128: (128,),  # head size of LLaMA-2-7B (R3)
    576: (36, 16),  # SmolLM2-135M, hidden
    896: (28, 32),  # Qwen2.5-0.5B, hidden
    1536: (12, 128),  # SmolLM2-135M, MLP; Qwen2.5-1.5B, hidden
    3584: (28, 128),  # Qwen2-7B, hidden
    4096: (4096,),  # LLaMA-2-7B, hidden
    4864: (76, 64),  # Qwen2.5-0.5B, MLP
    5120: (20, 256),  # LLaMA-2-13B, hidden
    11008: (172, 64),  # LLaMA-2-7B, MLP
    14336: (28, 512),  # LLaMA-3-8B and Mistral-7B, MLP
    29568: (44, 84, 8),  # Qwen2-72B, MLP: needs two table orders
}
DENSE_SIZES = [n for n in MODEL_SIZES if n <= 1536]
TABLE_ORDERS = [1, 2, *range(4, 257, 4)]


def random_rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def dense(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return F.linear(x, hadamard_matrix(x.shape[-1], dtype=x.dtype)) * scale


def by_scipy(x: torch.Tensor, scale: float) -> torch.Tensor:
    """A reference power-of-two routine that shares nothing with the package."""
    return x @ torch.from_numpy(scipy_hadamard(x.shape[-1])).to(x.dtype).T * scale


@pytest.mark.parametrize("n", TABLE_ORDERS)
def test_every_table_order_is_exactly_hadamard(n):
    h = hadamard_matrix(n)
    assert h.dtype == torch.float64 and h.shape == (n, n)
    assert torch.equal(h.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", DENSE_SIZES)
def test_model_sizes_are_exactly_hadamard(n):
    h = hadamard_matrix(n)
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_transform_keeps_inner_products_exactly_at_model_sizes(n):
    """Small integers make float64 exact, so (x H.T)(y H.T).T = n x y.T must hold to the last bit, without an
    n x n product.
    """
    x = torch.randint(-8, 9, (4, n), generator=torch.Generator().manual_seed(n)).double()
    y = hadamard_transform(x)
    assert torch.equal(y @ y.T, n * (x @ x.T))


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_transform_of_a_one_hot_row_is_a_column_of_the_factors_product(n):
    one_hot = torch.zeros(n, dtype=torch.float64)
    one_hot[n - 3] = 1
    column, index = torch.ones(1, dtype=torch.float64), n - 3
    for order in reversed(factors(n)):
        part = hadamard_matrix(order)[:, index % order] if order > 1 else torch.ones(1, dtype=torch.float64)
        column, index = torch.kron(part, column), index // order
    assert torch.equal(hadamard_transform(one_hot), column)


@pytest.mark.parametrize("n", [2**k for k in range(12)])
def test_powers_of_two_are_scipys(n):
    assert torch.equal(hadamard_matrix(n, dtype=torch.int64), torch.from_numpy(scipy_hadamard(n)))


@pytest.mark.parametrize(
    ("n", "expected"), [*MODEL_SIZES.items(), (1, (1,)), (12, (12, 1)), (1680, (28, 60, 1))]
)
def test_factors_are_as_documented(n, expected):
    assert factors(n) == expected


@given(n=st.integers(1, 40000))
@settings(max_examples=200, deadline=None)
def test_factors_multiply_to_n_or_there_are_none(n):
    found = factors(n)
    if found is None:
        with pytest.raises(ValueError, match=r"largest block of it that has one is \d+$") as refused:
            hadamard_matrix(n)
        block = int(str(refused.value).rsplit(" ", 1)[-1])
        assert block < n and n % block == 0 and factors(block)
        return
    *tables, power = found
    assert math.prod(found) == n and power & (power - 1) == 0
    assert all(order % 4 == 0 and order & (order - 1) for order in tables)


@pytest.mark.parametrize("n", [6, 7, 13696, 10920, 0, -4])
def test_sizes_without_a_matrix_have_no_factors(n):
    assert factors(n) is None


@pytest.mark.parametrize(
    ("n", "block"), [(10920, 312), (13696, 128), (6, 2), (7, 1)]
)  # 13696: MLP of Qwen1.5-14B and ChatGLM3-6B
@pytest.mark.parametrize("function", [hadamard_matrix, lambda n: hadamard_transform(torch.zeros(1, n))])
def test_a_missing_order_is_refused_and_the_largest_block_named(n, block, function):
    text = rf"hadamard\.n must be .*; got {n}: no Hadamard matrix of that order is known here\. "
    with pytest.raises(ValueError, match=rf"{text}The largest block of it that has one is {block}$"):
        function(n)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match=r"hadamard\.n must be >= 1; got 0"):
        hadamard_matrix(0)


@pytest.mark.parametrize("n", [1, 2, 12, 172, 256, 576, 896, 1024, 1536, 1680, 2048])
def test_transform_is_the_dense_product_within_its_own_error(n):
    """Both sum n float32 terms; the fast one in fewer steps, so twice the dense product's own error is a fair
    limit (and one ulp where that is 0).
    """
    x = random_rows(33, n)
    exact = dense(x.double(), 0.37)
    own_error = (dense(x, 0.37) - exact).abs().max()
    floor = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (hadamard_transform(x, 0.37) - exact).abs().max() <= 2 * own_error + floor
    assert torch.allclose(hadamard_transform(x.double(), 0.37), exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [64, 576, 512])
def test_16_bit_results_are_the_exact_ones_rounded_once(dtype, n):
    x = random_rows(20, n).to(dtype)
    y = hadamard_transform(x, n**-0.5)
    exact = dense(x.double(), n**-0.5)
    # Half a unit in the last place, plus the float32 sum's error where terms cancel.
    limit = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
    assert y.dtype == dtype and ((y.double() - exact).abs() <= limit).all()


def test_float16_sums_beyond_its_range_survive_when_scale_brings_them_back():
    x = torch.full((1, 4096), 100.0, dtype=torch.float16)  # the first sum is 409600; float16 ends at 65504
    assert hadamard_transform(x, 1 / 4096)[0, 0] == 100


def test_strided_and_batched_inputs_and_the_input_is_left_alone():
    base = random_rows(576, 3, 5)
    x, before = base.permute(1, 2, 0), base.clone()
    y = hadamard_transform(x, 0.5)
    assert y.shape == (3, 5, 576) and torch.allclose(y, dense(x, 0.5), atol=1e-4)
    assert torch.allclose(hadamard_transform(base[:, 0].T[::2], 0.5), y[0, ::2])
    assert torch.equal(base, before)
    assert torch.allclose(hadamard_transform(base[:, 0, 0]), dense(base[:, 0, 0]), atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 576), (2, 0, 64)])
def test_an_empty_batch_stays_empty(shape):
    assert hadamard_transform(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("x", [torch.zeros(2, 4, dtype=torch.int64), torch.tensor(1.0)])
def test_inputs_that_are_not_float_rows_are_refused(x):
    with pytest.raises(
        ValueError, match=r"hadamard_transform\.x must be \(\.\.\., n\) of a float dtype; got shape"
    ):
        hadamard_transform(x)


@pytest.mark.parametrize("n", [12, 64, 576, 896, 1680, 3584, 4096, 4864])
def test_another_power_of_two_routine_gives_equal_results(n):
    """The path a CUDA kernel takes, with scipy in the kernel's place; integers make float64 exact."""
    x = torch.randint(-8, 9, (2, 3, n), generator=torch.Generator().manual_seed(n)).double()
    assert torch.equal(hadamard._kernel_transform(x, 0.25, by_scipy), hadamard_transform(x, 0.25))


def test_a_matrix_cached_under_inference_mode_still_takes_part_in_a_backward_pass():
    hadamard._small.cache_clear()
    with torch.inference_mode():
        hadamard_transform(torch.ones(1, 24))
    x = torch.ones(1, 24, requires_grad=True)
    hadamard_transform(x).sum().backward()
    assert x.grad is not None and x.grad[0, 0] == hadamard_matrix(24)[:, 0].sum()


@pytest.fixture
def fresh_kernel_search():
    hadamard._cuda_kernel.cache_clear()
    yield
    hadamard._cuda_kernel.cache_clear()


@pytest.mark.usefixtures("fresh_kernel_search")
def test_a_broken_kernel_package_is_said_once_and_not_used(tmp_path, monkeypatch, caplog):
    (tmp_path / "fast_hadamard_transform.py").write_text(
        "import fast_hadamard_transform_cuda_that_was_not_built\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING, "dfrot_lab"):
        assert hadamard._cuda_kernel() is None and hadamard._cuda_kernel() is None
    assert len(caplog.records) == 1 and "cannot be imported" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [64, 576, 1680, 4096, 14336])
def test_cuda_agrees_with_the_cpu(n, dtype):
    x = random_rows(7, n).to(dtype)
    y = hadamard_transform(x.cuda(), n**-0.5)
    assert y.is_cuda and y.dtype == dtype
    assert torch.allclose(
        y.cpu().double(), hadamard_transform(x.double(), n**-0.5), rtol=torch.finfo(dtype).eps, atol=1e-5
    )


def test_a_large_transposed_tensor_is_transformed_too():
    x = torch.randn(256, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hadamard_transform(x.T), hadamard_transform(x.T.contiguous()))
