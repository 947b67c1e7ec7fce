"""Rotations are orthogonal, repeatable and what their names say; files hold them exactly or are refused."""

import json
import math

import pytest
import torch
from again import FLOAT64, assert_near
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dfrot_lab
from dfrot_lab.disk.rotation_files import load, save
from dfrot_lab.maths.hadamard import hadamard_matrix, hadamard_transform
from dfrot_lab.maths.rotations import check, distance, fast_product, make, orthogonality_error
from dfrot_lab.recipe.specs import RotationSpec
from dfrot_lab.rotate.random import matrix


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric_error(x: torch.Tensor) -> torch.Tensor:
    """Squared per-token error of symmetric 4-bit rounding, written here so that the claim does not lean on
    the package's quantizer.
    """
    step = x.abs().amax(dim=1, keepdim=True) / 7
    return ((x - (x / step).round() * step) ** 2).sum(dim=1)


def test_nr_is_the_identity():
    assert torch.equal(make(RotationSpec(kind="NR"), 48), torch.eye(48, dtype=torch.float64))


@given(
    kind=st.sampled_from(["RO", "RH"]),
    channels=st.sampled_from([1, 2, 12, 64, 172, 576]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None)
def test_random_rotations_are_orthogonal_and_repeatable(kind, channels, seed):
    spec = RotationSpec(kind=kind, seed=seed)
    R = make(spec, channels)
    assert R.dtype == torch.float64 and R.shape == (channels, channels)
    assert orthogonality_error(R) <= 1e-12
    assert_near(R, make(spec, channels), FLOAT64)


@pytest.mark.parametrize("kind", ["RO", "RH"])
def test_another_seed_is_another_rotation_and_the_global_generator_is_not_used(kind):
    state = torch.get_rng_state()
    R, R0 = (make(RotationSpec(kind=kind, seed=seed), 64) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert distance(R, R0) > 0.5


def test_ro_is_haar_distributed():
    """For Haar matrices the trace has mean 0 and variance 1 (Diaconis and Shahshahani 1994); Q without the
    sign fix has a negative mean trace.
    """
    traces = torch.stack([make(RotationSpec(kind="RO", seed=seed), 16).trace() for seed in range(400)])
    assert abs(traces.mean()) < 4 / math.sqrt(400)  # four standard errors
    assert 0.7 < traces.var() < 1.3
    unfixed = torch.stack([torch.linalg.qr(random_rows(16, 16, seed=seed))[0].trace() for seed in range(400)])
    assert unfixed.mean() < -4 / math.sqrt(400), "the sanity check must be able to fail"


@pytest.mark.parametrize("channels", [64, 576])
def test_rh_spreads_a_one_hot_row_evenly(channels):
    row = torch.zeros(1, channels, dtype=torch.float64)
    row[0, 5] = 10
    rotated = row @ make(RotationSpec(kind="RH"), channels)
    assert torch.allclose(rotated.abs(), torch.full_like(rotated, 10 / math.sqrt(channels)), rtol=1e-14)


def test_rh_is_random_signs_and_then_the_fast_transform():
    R = make(RotationSpec(kind="RH", seed=3), 576)
    signs = (R @ hadamard_matrix(576)).diagonal().sign()
    assert 0.4 < (signs > 0).double().mean() < 0.6
    x = random_rows(8, 576)
    assert torch.allclose(x @ R, hadamard_transform(x * signs, 576**-0.5), atol=1e-12)


@pytest.mark.parametrize("channels", [2048, 2560])
def test_a_large_hadamard_rotation_has_a_fast_product(channels):
    R = make(RotationSpec(kind="RH", seed=3), channels)
    x = random_rows(3, channels).float().double()
    fast = fast_product(R)
    assert_near(fast(x), x @ R, FLOAT64)
    assert fast_product(make(RotationSpec(kind="RO"), 2048)) is None
    R[5, 7] *= -1
    assert fast_product(R) is None
    assert fast_product(make(RotationSpec(kind="RH"), 64)) is None, "a product of that size is as fast"


def test_signs_change_symmetric_errors_before_the_hadamard_matrix_but_not_after():
    x, h = random_rows(32, 128), hadamard_matrix(128).T / math.sqrt(128)
    signs = torch.where(random_rows(128, seed=9) < 0, -1.0, 1.0).double()
    plain = symmetric_error(x @ h)
    torch.testing.assert_close(symmetric_error(x @ (h * signs)), plain, rtol=1e-9, atol=0)
    assert ((symmetric_error(x @ (signs[:, None] * h)) - plain).abs() > 1e-3 * plain).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["RO", "RH"])
def test_blocks_are_independent_rotations_on_the_diagonal(kind):
    spec = RotationSpec(kind=kind, block=16)
    R = make(spec, 48)
    first, second = R[:16, :16], R[16:32, 16:32]
    assert orthogonality_error(R) <= 1e-12 and not torch.equal(first, second)
    assert torch.equal(R, torch.block_diag(first, second, R[32:, 32:]))
    assert spec.name == f"{kind}-b16"


def test_a_size_without_a_hadamard_matrix_has_a_block_rotation():
    R = make(RotationSpec(kind="RH"), 780)
    assert torch.equal(R, make(RotationSpec(kind="RH", block=156), 780))
    assert orthogonality_error(R) <= 1e-12


@pytest.mark.parametrize(
    ("spec", "channels", "text"),
    [
        (RotationSpec(kind="NR"), 0, r"rotation\.channels must be >= 1; got 0"),
        (RotationSpec(kind="RO"), -3, r"rotation\.channels must be >= 1; got -3"),
        (
            RotationSpec(block=32),
            48,
            r"RotationSpec\.block must divide the 48 channels; got 32\. Use one of \[1, 2, 3, 4",
        ),
        (
            RotationSpec(kind="file", path="a.safetensors", block=8),
            48,
            r"RotationSpec\.block must be None for kind 'file'; got 8",
        ),
    ],
)
def test_impossible_sizes_are_refused(spec, channels, text):
    with pytest.raises(ValueError, match=text):
        matrix(spec, channels)


def test_a_file_is_not_made_but_read():
    with pytest.raises(ValueError, match=r"a file is read by rotate\.random\.matrix; got a\.safetensors"):
        make(RotationSpec(kind="file", path="a.safetensors"), 48)


@pytest.mark.parametrize(
    "spec", [RotationSpec(kind="NR"), RotationSpec(kind="RO", seed=2), RotationSpec(block=16)]
)
def test_the_matrix_of_a_spec_that_is_no_file_is_the_one_made(spec):
    assert torch.equal(matrix(spec, 48), make(spec, 48))


def test_distance_is_zero_for_equal_and_two_for_opposite():
    R, R0 = (make(RotationSpec(kind="RO", seed=seed), 128) for seed in (0, 1))
    assert distance(R, R) == 0
    assert distance(R, -R) == pytest.approx(2)
    assert distance(R, R0) == pytest.approx(math.sqrt(2), abs=0.05)
    with pytest.raises(
        ValueError, match=r"distance\.R0 must have the shape of R, \(128, 128\); got \(2, 2\)"
    ):
        distance(R, torch.eye(2))


def test_check_returns_float64_and_accepts_float32_rounding():
    R = make(RotationSpec(), 576).float()
    checked = check(R, 576)
    assert checked.dtype == torch.float64 and torch.equal(checked, R.double())


@pytest.mark.parametrize(
    ("R", "channels", "text"),
    [
        (torch.zeros(2, 3), None, r"rotation\.shape must be \(channels, channels\); got \(2, 3\)"),
        (torch.zeros(0, 0), None, r"rotation\.shape must be \(channels, channels\); got \(0, 0\)"),
        (torch.eye(4), 8, r"rotation\.shape must be \(8, 8\); got \(4, 4\)"),
        (torch.eye(4, dtype=torch.int64), None, r"rotation\.dtype must be a float dtype; got torch\.int64"),
        (torch.eye(4) * math.nan, None, r"rotation\.values must be finite; got 16 NaN or Inf of 16"),
        (
            torch.eye(4) * 1.001,
            None,
            r"rotation\.orthogonality_error must be <= 0\.0001; got 0\.002\. Save it in float32",
        ),
    ],
)
def test_what_is_not_a_rotation_is_refused(R, channels, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        check(R, channels)
    save_file({"R1": R}, tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match=text + r".*in .*r\.safetensors"):
        load(tmp_path / "r.safetensors", channels)


def test_a_saved_rotation_comes_back_exactly_with_its_spec(tmp_path):
    spec, path = RotationSpec(kind="RO", seed=4), tmp_path / "new" / "r.safetensors"
    R = make(spec, 48)
    save(R, path, spec, model="smollm2-135m", steps=3)
    assert torch.equal(load(path, 48), R)
    assert torch.equal(matrix(RotationSpec(kind="file", path=str(path)), 48), R)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["spec"]) == spec.to_dict()
    text = path.read_bytes()[:1000]
    assert b"smollm2-135m" in text and dfrot_lab.__version__.encode() in text


def test_saving_replaces_the_file_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "r.safetensors"
    save(torch.eye(4), path, None)
    save(-torch.eye(4), path, None)
    assert torch.equal(load(path), -torch.eye(4, dtype=torch.float64))
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_or_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.safetensors"
    save(torch.eye(4), path, None)
    with pytest.raises(ValueError, match=r"rotation\.orthogonality_error"):
        save(2 * torch.eye(4), path, None)

    def fail_halfway(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("dfrot_lab.disk.rotation_files.save_file", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        save(-torch.eye(4), path, None)
    assert torch.equal(load(path), torch.eye(4, dtype=torch.float64)) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_another_programs_file_with_one_square_tensor_is_read(tmp_path, dtype):
    path = tmp_path / "other.safetensors"
    R = hadamard_matrix(64, dtype=dtype) / 8  # 1/8 is exact in every dtype
    save_file({"Q": R, "history": torch.zeros(3)}, path)
    assert torch.equal(load(path, 64), R.double())


@pytest.mark.parametrize("tensors", [{}, {"a": torch.eye(2), "b": torch.eye(2)}, {"a": torch.zeros(2, 3)}])
def test_a_file_without_one_rotation_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "r.safetensors")
    with pytest.raises(
        ValueError, match=r"rotation\.path must hold a tensor 'R1' or exactly one square tensor; got"
    ):
        load(tmp_path / "r.safetensors")


def test_missing_truncated_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "r.safetensors"
    with pytest.raises(
        FileNotFoundError, match=r"rotation\.path must be an existing safetensors file; got .*r\.safetensors"
    ):
        load(path)
    save(make(RotationSpec(), 64), path, RotationSpec())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"rotation\.path must be a complete safetensors file; got .*r\.safetensors"
    ):
        load(path)
    path.write_text("not safetensors at all")
    with pytest.raises(ValueError, match=r"must be a complete safetensors file"):
        load(path)


def test_what_is_written_is_float64_r1(tmp_path):
    save(torch.eye(4).half(), tmp_path / "r.safetensors", None)
    tensors = load_file(tmp_path / "r.safetensors")
    assert list(tensors) == ["R1"] and tensors["R1"].dtype == torch.float64
