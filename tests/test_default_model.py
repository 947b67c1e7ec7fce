"""The default model shows what it was chosen for: the published phenomenon in numbers, on WikiText-2 and on
the packaged sample.

The exact figures were measured before this package existed, by a separate script (float32, 2 CPU cores); RO
and RH figures are means over five seeds.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.model import loading
from dfrot_lab.model.integer import IntegerLinear
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture, capture
from dfrot_lab.observe.errors import default_rotations, token_errors
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import (
    DEFAULT_RULE,
    PAPER_RULE,
    CaptureSpec,
    CorpusSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
    WeightSpec,
    recipe_of,
)
from dfrot_lab.rotate.dfrot import refined
from dfrot_lab.score.build import build, quantized
from dfrot_lab.score.perplexity import EvalResult, evaluate, evaluate_all

pytestmark = pytest.mark.model

SEEDS = range(5)
BIRTH, DEATH = 12, 28
"""The layers before whose norms token 0 is massive, first and last."""
CHANNEL = 507
WIKITEXT2, SAMPLE = "wikitext2", "wikipedia-sample"


def recorded(corpus: str, store: Store) -> Capture:
    return capture(CaptureSpec(corpus=CorpusSpec(name=corpus, split="calibration")), store)


def late_sites(found: Capture) -> list[str]:
    return [site for site in found.sites if BIRTH <= int(site.split(".")[1]) <= DEATH]


def mean_roots(found: Capture, seeds: range) -> pd.DataFrame:
    """Root error by seed and rotation: its mean over all tokens and sites, and token 0's median over the late
    sites.
    """
    rows = []
    for seed in seeds:
        matrices = default_rotations(found.channels, seed)
        if seed:
            del matrices["NR"]  # the same for every seed
        table = token_errors(found, matrices)
        late = table[(table["token"] == 0) & table["site"].isin(late_sites(found))]
        for kind in matrices:
            every, first = table[table["rotation"] == kind]["root"], late[late["rotation"] == kind]["root"]
            rows.append(
                {
                    "seed": seed,
                    "rotation": kind,
                    "mean": every.mean(),
                    "token_0": first.median(),
                    "low": first.min(),
                    "high": first.max(),
                }
            )
    return pd.DataFrame(rows)


# ---- the model


def test_it_is_the_model_the_design_names(default_model: LoadedModel):
    config = default_model.model.config
    assert (
        default_model.channels,
        len(default_model.layers),
        config.intermediate_size,
        config.vocab_size,
    ) == (576, 30, 1536, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings) == (
        9,
        3,
        True,
    )
    assert default_model.provenance.startswith("dequantised Q4_1/Q8_0 of ")
    assert default_model.model.get_submodule("lm_head").weight.dtype == torch.float32


# ---- massive activations


@pytest.fixture(params=[WIKITEXT2, SAMPLE])
def found(request: pytest.FixtureRequest, default_store: Store) -> Capture:
    if request.param == WIKITEXT2:
        request.getfixturevalue("wikitext2")
    return recorded(request.param, default_store)


def test_token_0_is_massive_from_layer_12_to_28_and_no_other_token_is(found: Capture):
    late = [found.sites.index(site) for site in late_sites(found)]
    assert len(late) == 2 * (DEATH - BIRTH + 1)
    assert bool((found.residual_channel[late, 0] == CHANNEL).all())
    assert bool((found.residual_max[late, 0] > 20_000).all())
    sun = massive.find(found, "sun")
    assert [row.nonzero().flatten().tolist() for row in sun[late]] == [[0]] * len(late)
    assert not sun[: late[0]].any(), "born in one step between the input norms of layers 11 and 12"
    assert bool(massive.find(found, PAPER_RULE)[late, 0].all())
    assert bool(
        massive.find(found, "ratio_64")[late[:-6], 0].all()
    )  # by layer 26 or so the other tokens have grown too


def test_the_massive_value_is_the_one_measured(wikitext2: None, default_store: Store):
    found = recorded(WIKITEXT2, default_store)
    site = found.sites.index("layers.15.input_norm")
    assert found.residual_channel[site, 0] == CHANNEL
    assert float(found.residual_max[site, 0]) == pytest.approx(24_816, abs=1)  # measured here: 24,816.1
    beyond = found.residual_max[site] > 1000 * found.residual_median[site]
    assert beyond.nonzero().flatten().tolist() == [0]
    assert 1.6 < float(found.residual_median[site]) < 11


def test_the_default_rule_finds_token_0_from_layer_3_on_and_no_plain_embedding(found: Capture):
    """139 rows of WikiText-2, 145 of the sample; the released code's rule marks 87 plain embeddings."""
    mask = massive.find(found, DEFAULT_RULE)
    sites = [found.sites[i] for i in mask.any(1).nonzero().flatten().tolist()]
    assert len(sites) == 50 and sites[0] == "layers.3.input_norm"
    assert int(mask[:, 0].sum()) == 50, "token 0 at each of them"
    assert 130 <= int(mask.sum()) <= 155
    assert massive.doubt(found, DEFAULT_RULE) is None


def test_few_rows_are_massive(wikitext2: None, default_store: Store):
    """Of 122,880 rows one in 350; most of those that the released code's rule marks have one value that takes
    nearly all of the norm of 24.
    """
    rows = recorded(WIKITEXT2, default_store).all_rows()
    spiked, marked = rows.abs().amax(1) > 22, massive.rows_rule(rows, PAPER_RULE)
    assert len(rows) == 122_880
    counts = [int(spiked.sum()), int(marked.sum()), int((spiked & marked).sum())]
    # 336, 347 and 258 by the published protocol, whose joined rows differ from the raw file's bytes (321, 315
    # and 228) in their blank lines.
    assert counts == pytest.approx([336, 347, 258], abs=3)


# ---- token errors


def test_root_errors_are_the_ones_measured(wikitext2: None, default_store: Store):
    """Measured here, seeds 0-4. All tokens: RO 3.337 3.174 3.239 3.233 3.288, RH 2.978 2.973 2.966 2.973
    2.964.

    Token 0: NR 2.772, RO 3.526 3.036 3.204 3.183 2.904, RH 1.320 1.322 1.338 1.336 1.247.
    """
    table = mean_roots(recorded(WIKITEXT2, default_store), SEEDS)
    kinds = {kind: table[table["rotation"] == kind] for kind in ("NR", "RO", "RH")}
    assert kinds["NR"]["mean"].to_numpy() == pytest.approx(10.44, abs=0.01)
    assert kinds["NR"]["token_0"].to_numpy() == pytest.approx(2.77, abs=0.03)
    assert kinds["RO"]["mean"].mean() == pytest.approx(3.22, rel=0.05)
    assert kinds["RH"]["mean"].mean() == pytest.approx(2.97, rel=0.05)
    assert kinds["RH"]["token_0"].mean() == pytest.approx(1.31, abs=0.05)
    nr = kinds["NR"].iloc[0]
    for seed in SEEDS:
        ro, rh = (kinds[kind].set_index("seed").loc[seed] for kind in ("RO", "RH"))
        assert ro["token_0"] > nr["token_0"] > rh["high"]
        assert rh["mean"] < ro["mean"] < nr["mean"]


def test_the_packaged_sample_shows_the_same_order(default_store: Store):
    """Measured, seed 0: token 0 NR 2.800, RO 3.536, RH 1.336; all tokens 10.32, 3.24, 2.95."""
    table = mean_roots(recorded(SAMPLE, default_store), range(1)).set_index("rotation")
    assert table.loc["RO", "token_0"] > table.loc["NR", "token_0"] > table.loc["RH", "high"]
    assert table.loc["RH", "mean"] < table.loc["RO", "mean"] < table.loc["NR", "mean"]
    assert table.loc["RH", "token_0"] == pytest.approx(1.31, abs=0.1)


def test_ordinary_tokens_hardly_tell_ro_from_rh(wikitext2: None, default_store: Store):
    """Median root error of RO over that of RH at one late site: 1.10 (seed 0), against 2.7 for token 0."""
    x = recorded(WIKITEXT2, default_store).rows("layers.15.input_norm")
    ro, rh = (
        squared_error(x @ default_rotations(576)[kind].float(), QuantSpec()).sqrt() for kind in ("RO", "RH")
    )
    assert float(ro[1:].median() / rh[1:].median()) == pytest.approx(1, abs=0.2)
    assert float(ro[0] / rh[0]) > 2


# ---- perplexity


def at(bits: str, windows: int, kind: str = "RH", **fields: object) -> Recipe:
    spec = recipe_of(
        bits, corpus=CorpusSpec(name=WIKITEXT2), rotation=RotationSpec(kind=kind), windows=windows, **fields
    )
    return spec.with_(weights=spec.weights.with_(corpus=CorpusSpec(name=WIKITEXT2, split="calibration")))


@pytest.fixture(scope="module")
def full_precision(wikitext2: None, default_store: Store) -> EvalResult:
    return evaluate(at("16-16-16", 2, "NR"), default_store)


def test_full_precision_is_the_perplexity_measured(full_precision: EvalResult):
    """Of the first 2 windows; of 6 it is 22.06."""
    assert full_precision.perplexity == pytest.approx(18.84, abs=0.01)
    assert full_precision.reference_loss == pytest.approx(full_precision.losses.mean(), abs=1e-5)
    assert full_precision.divergence == pytest.approx(0, abs=2e-6) and full_precision.agreement == 1


def test_hadamard_beats_random_orthogonal_at_16_4_16(
    wikitext2: None, default_store: Store, full_precision: EvalResult
):
    """Measured on the first 2 windows: RO 40.99, RH 30.40; another seed moves each by a few. Here the first
    alone, by all three measures.
    """
    ro, rh = evaluate_all([at("16-4-16", 1, kind) for kind in ("RO", "RH")], default_store)
    assert ro.perplexity - rh.perplexity > 2
    assert ro.divergence > rh.divergence and ro.agreement < rh.agreement
    assert 1.3 < rh.perplexity / np.exp(full_precision.losses[0]) < 2


def test_gptq_at_4_16_16_loses_under_a_fifth(
    wikitext2: None, default_store: Store, full_precision: EvalResult
):
    """4 x 1024 tokens of calibration, an eighth of the default, and one window."""
    spec = at("4-16-16", 1)
    found = evaluate(spec.with_(weights=spec.weights.with_(windows=4, window=1024)), default_store)
    text = CorpusSpec(name=WIKITEXT2, split="calibration")
    assert found.spec.weights == WeightSpec(corpus=text, windows=4, window=1024)
    assert 1.02 < found.perplexity / np.exp(full_precision.losses[0]) < 1.2


# ---- fast, and the same


def test_the_accelerated_refinement_ends_below_the_papers_100_steps(default_store: Store):
    """Rows of 256 tokens, gamma 100. Measured: objective 13.88 (massive 0.145) against 19.22 (0.250); at step
    20 it is 15.83. On all rows of 2048 it is below in its ordinary part as well: 9.36 (ordinary 6.40, massive
    0.252) against 10.12 (6.44, 0.313).
    """
    text = CorpusSpec(name=SAMPLE, split="calibration")
    spec = RefineSpec(capture=CaptureSpec(corpus=text, tokens=256))
    found, paper = (
        refined(spec.with_(variant=variant), default_store).history for variant in ("accelerated", "guarded")
    )
    sooner, end, published = found.set_index("step").loc[20], found.iloc[-1], paper.iloc[-1]
    assert sooner["objective"] < published["objective"]
    assert end["objective"] < 0.95 * published["objective"] and end["massive"] < published["massive"]


@torch.inference_mode()
def test_every_integer_linear_equals_fake_quantization_to_1e_5(default_store: Store):
    spec = recipe_of("4-4-4", weights="rtn", corpus=CorpusSpec(name=SAMPLE), windows=1)
    built = build(spec, default_store)
    found: list[float] = []

    def compare(module: IntegerLinear, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        x = module.before(args[0]) if module.before else args[0]
        fake = module.original(fake_quantize(x, spec.activations))
        found.append(float((output - fake).norm() / fake.norm()))

    with quantized(built, spec):
        for module in built.loaded.model.modules():
            if isinstance(module, IntegerLinear):
                module.register_forward_hook(compare)
        loading.body(built.loaded)(torch.arange(256)[None], use_cache=False)
    assert len(found) == 210
    assert max(found) < 1e-5  # measured: 8e-7
