"""The residual stream, layer by layer: how large its largest values are, and where (Sun et al., arXiv
2402.17762, Fig. 1 to 4)."""

import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import loading
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import intervene
from dfrot_lab.observe.capture import token_blocks
from dfrot_lab.recipe.specs import CaptureSpec

TOP = 3


@torch.inference_mode()
def streams(loaded: LoadedModel, ids: Tensor) -> list[Tensor]:
    """The residual stream before each layer (tokens, channels) for one window of token ids (window,)."""
    seen: list[Tensor] = []
    with intervene.before_layers(loaded, lambda _layer, x: seen.append(x[0].to("cpu", copy=True))):
        loading.body(loaded)(ids[None].to(loaded.device), use_cache=False)
    return seen


def residual_profile(spec: CaptureSpec, store: Store | None = None) -> pd.DataFrame:
    """The largest three |values| and the median before each layer over the capture's first window: model,
    corpus, layer, metric, value."""
    loaded = loading.load_model(spec.model, store)
    lines = []
    for layer, x in enumerate(streams(loaded, token_blocks(spec, loaded)[0])):
        magnitude = x.abs().flatten()
        largest = magnitude.topk(TOP).values.tolist()
        found = {f"top {n + 1}": value for n, value in enumerate(largest)} | {
            "median": float(magnitude.median())
        }
        about = (spec.model.source, spec.corpus.name, layer)
        lines += [(*about, name, value) for name, value in found.items()]
    return pd.DataFrame(lines, columns=["model", "corpus", "layer", "metric", "value"])


def magnitudes(spec: CaptureSpec, layer: int, tokens: int = 32, store: Store | None = None) -> pd.DataFrame:
    """|residual stream| before one layer of a capture's first tokens: token, channel, magnitude, text."""
    loaded = loading.load_model(spec.model, store)
    ids = token_blocks(spec, loaded)[0]
    x = streams(loaded, ids)[layer][:tokens].abs()
    index = pd.MultiIndex.from_product([range(len(x)), range(x.shape[1])], names=["token", "channel"])
    table = pd.DataFrame({"magnitude": x.flatten().numpy()}, index=index).reset_index()
    texts = [loaded.tokenizer.decode([i]) for i in ids[:tokens].tolist()]
    return table.assign(text=table["token"].map(dict(enumerate(texts))))
