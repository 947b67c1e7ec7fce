"""Which model and which text, said immutably: names that stand for bytes."""

from pathlib import Path
from typing import ClassVar

from dfrot_lab.recipe.base import Spec, one_of, ruled

DEFAULT_MODEL = "smollm2-135m"
SECOND_MODEL = "qwen2.5-coder-0.5b"  # for "does it hold elsewhere": fetched when it is named
PACKAGED = (DEFAULT_MODEL, SECOND_MODEL)
MODEL_SOURCES = "a packaged name, a folder, a .gguf file or hub:owner/name"
WHOLE = "whole"  # the part of a text file that is all of it
SPLITS = ("calibration", "evaluation", "train", "valid", "test", WHOLE)
DTYPES = ("float32", "float64", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
WINDOW = 2048  # tokens in one window: the length DFRot, QuaRot and GPTQ calibrate and evaluate with
SAMPLED = "None or a whole number >= 0"


class ModelSpec(Spec):
    """Which language model (`hub:owner/name` alone uses the network), on which device, and computed in which
    dtype: `auto` is float32 on a CPU, the weights' own on a GPU."""

    source: str = ruled(DEFAULT_MODEL, MODEL_SOURCES, pattern=r"\S")
    dtype: str = one_of("auto", ("auto", *DTYPES))
    revision: str | None = None
    device: str = one_of("auto", DEVICES)


class CorpusSpec(Spec):
    """Which text, and which part: a corpus's own halves (WikiText-2: valid and test split), or a split."""

    name: str = ruled("auto", "auto, wikitext2, wikipedia-sample or a text file", pattern=r"\S")
    split: str = one_of("evaluation", SPLITS)


CALIBRATION = CorpusSpec(split="calibration")


class CaptureSpec(Spec):
    """Which activations: all norm outputs, norms fused, of `tokens` tokens after the first `skip` windows, or
    of a `sample`'s windows."""

    LATER: ClassVar[tuple[str, ...]] = ("sample",)

    model: ModelSpec = ModelSpec()
    corpus: CorpusSpec = CALIBRATION
    tokens: int = ruled(WINDOW, "a whole number >= 1", ge=1)
    skip: int = ruled(0, "a whole number >= 0", ge=0)
    sample: int | None = ruled(None, SAMPLED, ge=0)

    def _check(self) -> None:
        self._require("skip", self.skip == 0 or self.sample is None, "0 with a sample, which says where")


class StaticSpec(Spec):
    """The text on which static scales are found: `windows` of `corpus`, the first or those of a `sample`; as
    many as PrefixQuant's (arXiv 2410.05265)."""

    corpus: CorpusSpec = CALIBRATION
    windows: int = ruled(8, "a whole number >= 1", ge=1)
    window: int = ruled(WINDOW, "a whole number >= 2", ge=2)
    sample: int | None = ruled(None, SAMPLED, ge=0)


class PrefixSpec(Spec):
    """Tokens before every window whose keys and values stay float, found on `windows` of `corpus` as those
    with a value of more than `ratio` times the median token's at a down_proj's input (PrefixQuant, arXiv
    2410.05265). `reference`: the full-precision model that divergences are from has none, or has them."""

    corpus: CorpusSpec = CALIBRATION
    windows: int = ruled(64, "a whole number >= 1", ge=1)
    window: int = ruled(512, "a whole number >= 2", ge=2)
    ratio: float = ruled(64.0, "> 1 and finite", gt=1, allow_inf_nan=False)
    reference: str = one_of("plain", ("plain", "prefix"))


def prefix_on(corpus: CorpusSpec, window: int, reference: str = "plain") -> PrefixSpec:
    """A prefix found on a text, in windows that are no longer than `window`."""
    spec = PrefixSpec(corpus=corpus, reference=reference)
    return spec.with_(window=min(window, spec.window))


def calibration_of(corpus: str, own: str | None) -> CorpusSpec:
    """What to capture, refine and calibrate on: a text file of its `own`, whole, where it is not the scored
    `corpus` itself; else the half of a corpus that is not scored."""
    same = own is None or (Path(corpus).is_file() and Path(own).is_file() and Path(own).samefile(corpus))
    is_file = own is not None and Path(own).is_file()
    return CorpusSpec(name=own or corpus, split=WHOLE if is_file and not same else "calibration")
