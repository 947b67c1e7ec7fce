"""Record one forward pass: every norm's output, written to the store site by site, and how large the residual
stream is."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.model import corpus, door, hooks, loading, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.specs import WINDOW, CaptureSpec

log = logging.getLogger(__name__)

_MEDIAN_SAMPLE = 1 << 16
"""Values of whole tokens, evenly spaced, that the residual median is taken over: of all it costs a fifth of
the forward pass."""


@dataclass(frozen=True)
class Capture:
    """A recorded forward pass, opened from the store without model or corpus."""

    artefact: Artefact

    @cached_property
    def _about(self) -> dict[str, Any]:
        return dict(self.artefact.json("about"))

    @cached_property
    def _residual(self) -> dict[str, Tensor]:
        return self.artefact.tensors("residual")

    @property
    def key(self) -> str:
        """The artefact's content key."""
        return self.artefact.key

    @property
    def spec(self) -> CaptureSpec:
        """What it was recorded from and how."""
        return CaptureSpec.of(self._about["spec"])

    @property
    def sites(self) -> list[str]:
        """Sites as the forward pass meets them: layers.0.input_norm, layers.0.post_attention_norm, ..."""
        return list(self._about["sites"])

    @property
    def tokens(self) -> int:
        """Rows of each site."""
        return len(self._about["ids"])

    @property
    def channels(self) -> int:
        """Columns of each site."""
        return int(self._about["channels"])

    @property
    def ids(self) -> list[int]:
        """Token ids, one a row."""
        return list(self._about["ids"])

    @property
    def texts(self) -> list[str]:
        """Each token's text as the tokenizer decodes it alone, white space kept."""
        return list(self._about["texts"])

    def rows(self, site: str) -> Tensor:
        """The norm's output at `site` (tokens, channels), memory-mapped."""
        self.place(site)
        return self.artefact.tensors(site)["x"]

    def place(self, site: str) -> int:
        """Where `site` is in `sites`; KeyError."""
        if site not in self.sites:
            raise KeyError(f"no site {site!r} in this capture; it has {self.sites[0]} .. {self.sites[-1]}")
        return self.sites.index(site)

    def all_rows(self) -> Tensor:
        """Every site's rows below one another (sites * tokens, channels), float32: what R1 is refined on."""
        return torch.cat([self.rows(site).float() for site in self.sites])

    @property
    def residual_max(self) -> Tensor:
        """Largest |value| of each token in the residual stream before each norm (sites, tokens)."""
        return self._residual["abs_max"]

    @property
    def residual_channel(self) -> Tensor:
        """The channel that largest value sits in (sites, tokens)."""
        return self._residual["channel"]

    @property
    def residual_median(self) -> Tensor:
        """Median |value| of the residual stream before each norm (sites,), over evenly spaced tokens."""
        return self._residual["median"]


def capture(
    spec: CaptureSpec | None = None, store: Store | None = None, loaded: LoadedModel | None = None
) -> Capture:
    """The capture `spec` describes, from the store or recorded now. `loaded`, where given, must be a fresh
    load of `spec.model`; it gets prepared. ValueError: more tokens than the corpus or the model's context
    has; NaN or Inf, naming site and token."""
    spec, store = door.resolved(spec or CaptureSpec()), store or Store()
    if loaded is not None and loaded.spec != spec.model:
        raise ValueError(
            f"capture.loaded must be a load of CaptureSpec.model {spec.model.source}; got one of "
            f"{loaded.spec.source}"
        )

    def make(writer: Writer) -> None:
        ready = loaded or loading.load_model(spec.model, store)
        ids = token_blocks(spec, ready)
        surgery.prepare(ready)
        count = len(hooks.sites_of(ready, *hooks.NORMS))
        size = count * ids.numel() * ready.channels * 4 / 1e9
        log.info("capturing %d sites of %d tokens (%.2f GB)", count, ids.numel(), size)
        started = time.perf_counter()
        sites, residual = record(ready, ids, lambda site, x: writer.save_tensors(site, {"x": x}))
        writer.save_tensors("residual", residual)
        flat = ids.flatten().tolist()
        texts = [ready.tokenizer.decode([i]) for i in flat]
        about = {"sites": sites, "channels": ready.channels, "ids": flat, "texts": texts}
        writer.save_json("about", {**about, "spec": spec.plain()})
        seconds = time.perf_counter() - started
        writer.note.update(provenance=ready.provenance, family=ready.family, forward_seconds=seconds)

    return Capture(store.get_or_make("capture", keys.identity(spec, door.PRINTS), make))


def stored(spec: CaptureSpec, store: Store) -> Capture | None:
    """The capture `spec` describes if the store has it, else None; records nothing."""
    artefact = store.open("capture", keys.identity(door.resolved(spec), door.PRINTS))
    return None if artefact is None else Capture(artefact)


def token_blocks(spec: CaptureSpec, loaded: LoadedModel) -> Tensor:
    """Token ids (blocks, window): one block of up to 2048 tokens, or whole blocks of 2048."""
    if spec.tokens > WINDOW and spec.tokens % WINDOW:
        raise ValueError(
            f"CaptureSpec.tokens must be at most {WINDOW} or a multiple of it; got {spec.tokens}"
        )
    window = min(spec.tokens, WINDOW)
    loading.check_tokens(loaded, window)
    blocks = spec.skip + spec.tokens // window
    return corpus.token_blocks(spec.corpus, loaded.tokenizer, blocks=blocks, window=window)[spec.skip :]


def record(
    loaded: LoadedModel, ids: Tensor, save: Callable[[str, Tensor], None]
) -> tuple[list[str], dict[str, Tensor]]:
    """Run `ids` (blocks, window) once and hand each norm's output (tokens, channels) to `save` as it appears.
    The sites, and {abs_max, channel: (sites, tokens); median: (sites,)} of the residual stream before each.
    """
    names: list[str] = []
    rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def see(site: str, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        if site.endswith("_in"):
            rows.append(_extremes(x))
            return
        bad = (~x.isfinite()).any(-1).nonzero()
        if len(bad):
            raise ValueError(
                f"activations must be finite; got NaN or Inf at site {site}, token {int(bad[0])}. The model "
                "is broken, or its dtype too small."
            )
        names.append(site)
        save(site, x)

    sites = hooks.sites_of(loaded, *hooks.NORMS, *hooks.NORM_INPUTS)
    with torch.inference_mode(), hooks.at_sites(loaded, see, sites):
        loading.body(loaded)(ids.to(loaded.device), use_cache=False)
    abs_max, channel, median = (torch.stack(column) for column in zip(*rows, strict=True))
    return names, {"abs_max": abs_max, "channel": channel, "median": median}


def _extremes(residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a residual stream (tokens, channels) each token's largest |value|, its channel; the median."""
    magnitude = residual.abs()
    value, channel = magnitude.max(-1)
    step = max(1, residual.numel() // _MEDIAN_SAMPLE)
    return value, channel, magnitude[::step].median()
