"""Integer linears: the product exact, the result that of fake quantization, for every family, and the model
as it was afterwards.
"""

from collections.abc import Callable

import pytest
import torch
from conftest import save_tiny
from torch import Tensor, nn

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import integer, loading, surgery
from dfrot_lab.model.integer import IntegerLinear, _Input, fits, product
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import RotationSpec, WeightSpec, recipe_of
from dfrot_lab.rotate.transforms import Transforms
from dfrot_lab.score.build import Built, is_integer, quantized
from dfrot_lab.weights import rtn, run

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def codes(*shape: int, low: int = -128, high: int = 128, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def activations(tokens: int = 700, channels: int = 64) -> Tensor:
    """More rows than are worked on at once, some of them massive."""
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(3))
    x[::50, 5] = 300
    return x


def pair(
    bits: int = 4, bias: bool = True, spec: QuantSpec | None = None, **options: object
) -> tuple[IntegerLinear, nn.Linear, QuantSpec]:
    """An integer linear and the float one it stands for, whose weight is on the grid."""
    torch.manual_seed(0)
    spec, original = (
        spec or QuantSpec(scheme="asymmetric"),
        nn.Linear(64, 24, bias=bias).requires_grad_(False),
    )
    how = WeightSpec(
        method="rtn", quantizer=QuantSpec(bits=bits, granularity="per_channel"), clip_search=False
    )
    weight = rtn.quantize(original.weight, None, how)
    original.weight.copy_(weight.codes * weight.scale)
    return (
        IntegerLinear(original, weight, _Input(), spec, options.get("before"), options.get("spare")),
        original,
        spec,
    )  # type: ignore[arg-type]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("fast", [True, False], ids=["int8", "floats"])
@pytest.mark.parametrize("low", [-128, -8])
@pytest.mark.parametrize("shape", [(1, 8, 8), (17, 64, 24), (40, 33, 7), (600, 1536, 16)], ids=str)
def test_the_product_is_exact_at_the_extremes_too(monkeypatch, shape, low, fast):
    """With torch's int8 product, however slow it is here, and with floats, which hold sums of small codes in
    float32 and of large ones in float64.
    """
    monkeypatch.setattr(integer, "_fast_on_cpu", lambda: fast)
    if not fast:
        monkeypatch.setattr(torch, "_int_mm", None)
    m, k, n = shape
    a, b = codes(m, k, low=low, high=-low), codes(n, k, low=low, high=-low, seed=1)
    a[0], b[0] = low, low
    expected = a.long() @ b.long().T
    assert product(a, b).dtype == torch.int32
    assert torch.equal(product(a, b).long(), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=b, scheme="symmetric" if s else "asymmetric")
        for b, s in [(2, True), (4, True), (8, True), (2, False), (4, False), (7, False)]
    ],
)
def test_equals_fake_quantization_to_1e_5(spec, bits):
    found, original, _ = pair(bits, spec=spec)
    x = activations()
    expected = original(fake_quantize(x, spec))
    assert relative(found(x), expected) < 1e-6
    assert float((found(x) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert relative(original(x), expected) > 1e-3, "rounding changed nothing: the test is vacuous"


def test_clipped_activations_too():
    found, original, spec = pair(spec=QuantSpec(scheme="asymmetric", clip_ratio=0.9))
    x = activations()
    assert relative(found(x), original(fake_quantize(x, spec))) < 1e-6


@pytest.mark.parametrize("spec", [QuantSpec(bits=8, scheme="asymmetric"), QuantSpec(bits=9)])
def test_what_does_not_fit_int8_is_not_integer(spec):
    assert not fits(spec)
    assert not is_integer(recipe_of("4-8-16").with_(activations=spec))


def test_shapes_bias_and_dtype():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found, original, spec = pair(bias=dtype != torch.float64)
        x = activations()[:6].to(dtype)
        y = found(x.reshape(2, 3, 64))
        assert y.shape == (2, 3, 24) and y.dtype == dtype
        assert relative(y.reshape(6, 24).float(), original(fake_quantize(x, spec).float())) < (
            1e-2 if dtype == torch.bfloat16 else 1e-6
        )


def test_float16_holds_what_its_int32_sums_do_not():
    """8-bit codes of 4096 channels sum to up to 66 million; float16 ends at 65,504."""
    original = nn.Linear(4096, 16, bias=False).requires_grad_(False)
    original.weight.fill_(0.01)
    spec = WeightSpec(method="rtn", quantizer=QuantSpec(bits=8, granularity="per_channel"), clip_search=False)
    weight = rtn.quantize(original.weight, None, spec)
    x = torch.rand(20, 4096).to(torch.float16)
    found = IntegerLinear(original, weight, _Input(), QuantSpec(bits=8), None, None)(x)
    assert found.dtype == torch.float16 and relative(found.double(), original(x.float()).double()) < 1e-2


def test_a_row_of_zeros_gives_the_bias():
    found, original, _ = pair()
    assert torch.equal(found(torch.zeros(2, 64)), original.bias.expand(2, 24))


def test_the_transform_comes_before_the_codes():
    def double(x: Tensor) -> Tensor:
        return x.flip(-1) * 2

    found, original, spec = pair(before=double)
    x = activations()
    assert relative(found(x), original(fake_quantize(double(x), spec))) < 1e-6


def test_spared_rows_are_the_float_linears():
    def spare(x: Tensor) -> Tensor:
        return x.abs().amax(-1) > 100

    found, original, spec = pair(spare=spare)
    x, y = activations(), None
    y = found(x)
    assert 0 < int(spare(x).sum()) < len(x)
    assert relative(y[spare(x)], original(x[spare(x)])) < 1e-6
    assert relative(y[~spare(x)], original(fake_quantize(x, spec))[~spare(x)]) < 1e-6


def test_linears_that_read_one_tensor_quantize_it_once(monkeypatch):
    first, _, _ = pair()
    second = IntegerLinear(
        first.original,
        rtn.quantize(first.original.weight, None, WeightSpec(method="rtn")),
        first.source,
        first.spec,
        None,
        None,
    )
    calls: list[int] = []
    whole: Callable[..., Tensor] = integer.centred
    monkeypatch.setattr(integer, "centred", lambda part, *how: calls.append(len(part)) or whole(part, *how))
    x = activations(tokens=100)
    assert relative(first(x), second(x)) < 1e-6 and calls == [100]
    first(x.clone())
    assert calls == [100, 100]


def built(tmp_path, family: str) -> Built:
    """A tiny model, RTN at 4 bits, R1 to R4, in float64, where a value that falls on another code by float
    rounding is rare.
    """
    loaded = loading.load_model(save_tiny(tmp_path / "model", family))
    surgery.prepare(loaded)
    R = rotations.make(RotationSpec(), loaded.channels)
    surgery.rotate_residual(loaded, R)
    surgery.rotate_heads(loaded)
    surgery.rotate_down(loaded)
    weights = run.quantize_weights(
        loaded, WeightSpec(method="rtn", clip_search=False), {"model": "tiny"}, Store(tmp_path / "store")
    )
    loaded.model.double()
    for layer, found in zip(loaded.layers, weights, strict=True):
        for name, weight in found.items():
            loading.linear(layer, name).weight.data.copy_(weight.codes * weight.scale.double())
    return Built(loaded, Transforms(R1=R), R, weights)


@pytest.mark.parametrize("keep", [None, "nr_error_9.5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_computes_what_fake_quantization_does(tmp_path, family, keep):
    ready, spec = built(tmp_path, family), recipe_of("4-4-4", keep_out=keep)
    ids = torch.arange(40)[None] % 90
    linears = [type(m) for m in ready.loaded.model.modules()]
    with torch.inference_mode():
        plain = ready.loaded.model(ids).logits
        with quantized(ready, spec, fake=True):
            fake = ready.loaded.model(ids).logits
        with quantized(ready, spec):
            assert sum(isinstance(m, IntegerLinear) for m in ready.loaded.model.modules()) == 7 * len(
                ready.loaded.layers
            )
            found = ready.loaded.model(ids).logits
    assert relative(found, fake) < 1e-9
    assert relative(plain, fake) > 1e-3
    assert [type(m) for m in ready.loaded.model.modules()] == linears


def test_after_an_error_the_model_is_as_before_and_nothing_is_held(tmp_path):
    ready = built(tmp_path, "llama")
    before = {name: id(module) for name, module in ready.loaded.model.named_modules()}
    with pytest.raises(KeyboardInterrupt), torch.inference_mode(), quantized(ready, recipe_of("4-4-4")):
        source = ready.loaded.layers[0].get_submodule("mlp.down_proj").source
        ready.loaded.model(torch.arange(8)[None])
        assert source.last is not None
        raise KeyboardInterrupt
    assert {name: id(module) for name, module in ready.loaded.model.named_modules()} == before
    assert source.last is None
