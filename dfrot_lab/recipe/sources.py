"""Which model and which text, said immutably: names that stand for bytes."""

from pathlib import Path

from dfrot_lab.recipe.base import Spec, one_of, ruled

DEFAULT_MODEL = "smollm2-135m"
SECOND_MODEL = "qwen2.5-coder-0.5b"  # for "does it hold elsewhere": fetched when it is named
PACKAGED = (DEFAULT_MODEL, SECOND_MODEL)
MODEL_SOURCES = "a packaged name, a folder, a .gguf file or hub:owner/name"
WHOLE = "whole"  # the part of a text file that is all of it
SPLITS = ("calibration", "evaluation", "train", "valid", "test", WHOLE)
DTYPES = ("float32", "float64", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


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


def calibration_of(corpus: str, own: str | None) -> CorpusSpec:
    """What to capture, refine and calibrate on: a text file of its `own`, whole, where it is not the scored
    `corpus` itself; else the half of a corpus that is not scored."""
    same = own is None or (Path(corpus).is_file() and Path(own).is_file() and Path(own).samefile(corpus))
    is_file = own is not None and Path(own).is_file()
    return CorpusSpec(name=own or corpus, split=WHOLE if is_file and not same else "calibration")
