"""A 4-4-4 forward in integer arithmetic against the plain float32 forward and against eager fake
quantization: `python benchmarks/evaluation.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from common import Row, eager, options, peak_gb, print_peak, report, seconds

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import door, hooks, loading, surgery
from dfrot_lab.model.integer import IntegerLinear
from dfrot_lab.recipe.specs import CorpusSpec, Recipe, recipe_of
from dfrot_lab.score.build import Built, build, quantized
from dfrot_lab.score.perplexity import window_loss
from dfrot_lab.study import cost


def spec() -> Recipe:
    """RH at 4-4-4 with weights rounded to nearest: how they were rounded costs a forward nothing."""
    recipe = recipe_of("4-4-4", weights="rtn", corpus=CorpusSpec(name="wikipedia-sample"), windows=1)
    return door.resolved(recipe).canonical()


def ready() -> tuple[Built, torch.Tensor]:
    """The built model and one window of token ids."""
    built = build(spec(), Store())
    return built, torch.randint(0, 40_000, (1, 2048), generator=torch.Generator().manual_seed(0))


@contextmanager
def fake_eager(built: Built) -> Iterator[None]:
    """The same model as fake quantization in float, every linear's input by `eager`."""
    sites = hooks.sites_of(built.loaded, *hooks.LINEAR_INPUTS, "k", "v")

    def quantize(site: str, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, spec().values) if site.endswith((".k", ".v")) else eager(x)

    with surgery.online(built.loaded, r3=True, r4=True, function=quantize, sites=sites):
        yield


@torch.inference_mode()
def worst_relative_difference(built: Built, ids: torch.Tensor) -> float:
    """Over all linears, on the input each really gets: ||integer - fake|| / ||fake||."""
    found: list[float] = []

    def compare(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        x = module.before(args[0]) if module.before else args[0]  # type: ignore[operator]
        rounded = fake_quantize(x, module.source.spec)  # type: ignore[union-attr, arg-type]
        fake = module.original(rounded)  # type: ignore[operator]
        found.append(float((output - fake).norm() / fake.norm()))

    with quantized(built, spec()):
        for module in built.loaded.model.modules():
            if isinstance(module, IntegerLinear):
                module.register_forward_hook(compare)  # type: ignore[arg-type]
        loading.body(built.loaded)(ids, use_cache=False)
    return max(found)


def one_window(kind: str) -> None:
    """Score one window, plain or quantized, and print this process's peak memory."""
    built, ids = ready()
    if kind == "plain":
        window_loss(built.loaded, ids[0])
    else:
        with quantized(built, spec()):
            window_loss(built.loaded, ids[0])
    print_peak()


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    given = options(__doc__).parse_args()
    if given.memory:
        one_window(given.memory)
        return
    built, ids = ready()

    def forward() -> object:
        return loading.body(built.loaded)(ids, use_cache=False)

    plain = seconds(forward)
    with quantized(built, spec()):
        ours = seconds(forward)
    with quantized(built, spec(), fake=True):
        fake = seconds(forward)
    with fake_eager(built):
        slow = seconds(forward)
    linears = (
        2
        * 2048
        * sum(
            loading.linear(layer, name).weight.numel()
            for layer in built.loaded.layers
            for name in built.loaded.roles.linears(layer)
        )
    )
    rates = cost.measure_machine()
    floor = plain - linears / rates.float_rate + linears / rates.int8_rate
    worst = worst_relative_difference(built, ids)
    peaks = {kind: peak_gb(__file__, "--memory", kind) for kind in ("plain", "quantized")}
    rows = [
        Row(
            "evaluation",
            "4-4-4 forward of 2048 tokens / plain float32 forward",
            ours,
            plain,
            bar=1.3,
            floor=floor,
        ),
        Row("evaluation", "eager fake quantization / integer", ours, slow, at_least=True, floor=floor),
        Row("evaluation", "our fake quantization / integer", ours, fake, bar=1.0, at_least=True),
        Row(
            "evaluation",
            "worst relative difference of a linear to fake quantization / 1e-5",
            worst,
            1e-5,
            unit="",
            bar=1.0,
        ),
        Row(
            "evaluation",
            "peak memory of a scored window / plain model's",
            peaks["quantized"],
            peaks["plain"],
            unit="GB",
            bar=1.2,
        ),
    ]
    report(rows, given.out)


if __name__ == "__main__":
    main()
