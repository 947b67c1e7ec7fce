"""Record one forward pass: every norm's output, site by site, and how large the residual stream is."""

import logging
import time

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.model import corpus, door, hooks, loading, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import WINDOW, CaptureSpec

log = logging.getLogger(__name__)
HOLDS = {"holds": 2}  # raise it with any change of what a capture keeps: older ones are then recorded anew
_MEDIAN_SAMPLE = 1 << 16  # values the residual median is of: of all it costs a fifth of the pass


class Capture:
    """A recorded forward pass, opened from the store without model or corpus: of each of `sites`, as the pass
    meets them (layers.0.input_norm, ...), `tokens` rows and `channels` columns; the tokens' `ids` and `texts`
    (decoded alone). Of the residual stream before each norm: `residual_max` and `residual_channel` (sites,
    tokens), largest |value| and where it sits; `residual_median` (sites,), over evenly spaced tokens."""

    def __init__(self, artefact: Artefact) -> None:
        about, residual = artefact.json("about"), artefact.tensors("residual")
        self.artefact, self.key, self.spec = artefact, artefact.key, CaptureSpec.of(about["spec"])
        self.sites: list[str] = about["sites"]
        self.ids: list[int] = about["ids"]
        self.texts: list[str] = about["texts"]
        self.tokens, self.channels = len(self.ids), int(about["channels"])
        self.residual_max, self.residual_channel = residual["abs_max"].float(), residual["channel"]
        self.residual_median = residual["median"].float()

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


def capture(spec: CaptureSpec | None = None, store: Store | None = None) -> Capture:
    """The capture `spec` describes, stored or recorded now. ValueError: text or context too short; NaN."""
    spec, store = door.resolved(spec or CaptureSpec()), store or Store()

    def make(writer: Writer) -> None:
        ready = loading.load_model(spec.model, store)
        ids = token_blocks(spec, ready)
        surgery.prepare(ready)
        count = len(hooks.sites_of(ready, *hooks.NORMS))
        size = count * ids.numel() * ready.channels * 4 / 1e9
        log.info("capturing %d sites of %d tokens (%.2f GB)", count, ids.numel(), size)
        started = time.perf_counter()
        sites, residual = record(ready, ids, lambda site, x: writer.save_tensors(site, {"x": x}))
        writer.save_tensors("residual", residual)
        flat = ids.flatten().tolist()
        about = {"sites": sites, "channels": ready.channels, "ids": flat, "spec": spec.plain()}
        writer.save_json("about", {**about, "texts": [ready.tokenizer.decode([i]) for i in flat]})
        seconds = time.perf_counter() - started
        writer.note.update(provenance=ready.provenance, family=ready.family, forward_seconds=seconds)

    return Capture(store.get_or_make("capture", keys.identity(spec, door.prints) | HOLDS, make))


def stored(spec: CaptureSpec, store: Store) -> Capture | None:
    """The capture `spec` describes if the store has it, else None; records nothing."""
    artefact = store.open("capture", keys.identity(door.resolved(spec), door.prints) | HOLDS)
    return None if artefact is None else Capture(artefact)


def token_blocks(spec: CaptureSpec, loaded: LoadedModel) -> Tensor:
    """Token ids (blocks, window): one block of up to 2048 tokens, or whole blocks of 2048."""
    window = min(spec.tokens, WINDOW)
    rule = f"at most {WINDOW} or a multiple of it"
    require("CaptureSpec.tokens", spec.tokens, spec.tokens % window == 0, rule)
    loading.check_tokens(loaded, window)
    blocks = spec.skip + spec.tokens // window
    return corpus.token_blocks(spec.corpus, loaded.tokenizer, blocks=blocks, window=window)[spec.skip :]


def record(loaded: LoadedModel, ids: Tensor, save: hooks.At) -> tuple[list[str], dict[str, Tensor]]:
    """Run `ids` (blocks, window) once and hand each norm's output (tokens, channels) to `save`. Sites, and
    {abs_max, channel: (sites, tokens); median: (sites,)} of the residual stream before each."""
    names: list[str] = []
    rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def see(site: str, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        if site.endswith("_in"):
            rows.append(_extremes(x))
            return
        if len(bad := (~x.isfinite()).any(-1).nonzero()):
            said = f"got NaN or Inf at site {site}, token {int(bad[0])}"
            raise ValueError(f"activations must be finite; {said}: a broken model, or too small a dtype")
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
    step = max(1, residual.numel() // _MEDIAN_SAMPLE)
    return (*magnitude.max(-1), magnitude[::step].median())
