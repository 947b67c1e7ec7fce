"""Record one forward pass: every norm's output, site by site, and how large the residual stream is."""

import logging
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.model import corpus, door, hooks, loading, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.proof import TOKENS, Proof
from dfrot_lab.model.stream import Walk
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import WINDOW, CaptureSpec

log = logging.getLogger(__name__)
HOLDS = {"holds": 2}  # raise it with any change of what a capture keeps: older ones are then recorded anew
Extremes = tuple[Tensor, Tensor, Tensor]  # a token's largest |value|, its channel; values for the median
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
        """The norm's output at `site` (tokens, channels), memory-mapped; what was 16 bits wide as float32."""
        self.place(site)
        x = self.artefact.tensors(site)["x"]
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def place(self, site: str) -> int:
        """Where `site` is in `sites`; KeyError."""
        if site not in self.sites:
            raise KeyError(f"no site {site!r} in this capture; it has {self.sites[0]} .. {self.sites[-1]}")
        return self.sites.index(site)

    def largest(self, site: str) -> int:
        """The token with the largest value in the residual stream that the norm at `site` reads."""
        return int(self.residual_max[self.place(site)].argmax())

    def all_rows(self, chosen: Tensor | None = None) -> Tensor:
        """Every site's rows below one another (sites * tokens, channels), float32: what R1 is refined on.
        With `chosen` (rows,), in rising order, those at these places alone, which is all the memory taken."""
        if chosen is None:
            return torch.cat([self.rows(site).float() for site in self.sites])
        ends = torch.arange(1, len(self.sites)) * self.tokens
        cuts = torch.searchsorted(chosen.contiguous(), ends)
        parts = zip(self.sites, chosen.tensor_split(cuts), strict=True)
        return torch.cat([self.rows(site)[own % self.tokens].float() for site, own in parts])


def capture(spec: CaptureSpec | None = None, store: Store | None = None) -> Capture:
    """The capture `spec` describes, stored or recorded now. ValueError: text or context too short; NaN."""
    spec, store = door.resolved(spec or CaptureSpec()), store or Store()

    def make(writer: Writer) -> None:
        ready = loading.load_model(spec.model, store)
        ids = token_blocks(spec, ready)
        proof = Proof(ready, ids[:1, :TOKENS])
        surgery.prepare(ready)
        proof.check(None)
        count = len(hooks.sites_of(ready, *hooks.NORMS))
        each = getattr(torch, ready.spec.dtype).itemsize
        writer.reserve(size := count * ids.numel() * ready.channels * each)
        log.info("capturing %d sites of %d tokens (%.2f GB)", count, ids.numel(), size / 1e9)
        started = time.perf_counter()
        sites, residual = record(ready, ids, lambda site, x: writer.save_tensors(site, {"x": x}), writer)
        writer.save_tensors("residual", residual)
        flat = ids.flatten().tolist()
        about = {"sites": sites, "channels": ready.channels, "ids": flat, "spec": spec.plain()}
        writer.save_json("about", {**about, "texts": [ready.tokenizer.decode([i]) for i in flat]})
        seconds = time.perf_counter() - started
        writer.note.update(provenance=ready.provenance, family=ready.family, forward_seconds=seconds)

    return Capture(store.get_or_make("capture", lambda: keys.identity(spec, door.prints) | HOLDS, make))


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
    of: dict[str, Any] = {"blocks": blocks, "window": window, "sample": spec.sample}
    return corpus.sampled_blocks(spec.corpus, loaded.tokenizer, **of)[spec.skip :]


@torch.inference_mode()
def record(
    loaded: LoadedModel, ids: Tensor, save: hooks.At, writer: Writer | None = None
) -> tuple[list[str], dict[str, Tensor]]:
    """Run `ids` (blocks, window) once and hand each norm's output (tokens, channels) to `save`. Sites, and
    {abs_max, channel: (sites, tokens); median: (sites,)} of the residual stream before each. With a `writer`
    a killed run goes on at the layer where it was."""
    windows: dict[str, list[Tensor]] = defaultdict(list)  # of a site that not all have passed yet
    extremes: dict[str, list[Extremes]] = defaultdict(list)
    found: dict[int, dict[str, Tensor]] = {}

    def see(site: str, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        if site.endswith("_in"):
            extremes[site].append(_extremes(x, ids.numel()))
            return
        if len(bad := (~x.isfinite()).any(-1).nonzero()):
            token = int(bad[0]) + sum(map(len, windows[site]))
            said = f"got NaN or Inf at site {site}, token {token}"
            raise ValueError(f"activations must be finite; {said}: a broken model, or too small a dtype")
        windows[site].append(x)
        if len(windows[site]) == len(ids):
            parts = windows.pop(site)
            save(site, parts[0] if len(parts) == 1 else torch.cat(parts))

    with hooks.at_sites(loaded, see, hooks.sites_of(loaded, *hooks.NORMS, *hooks.NORM_INPUTS)):
        walk = Walk(loaded, ids.split(1), name="capture", writer=writer)
        for number in walk.layers():
            walk.step(number)
            found[number] = _joined([extremes.pop(f"layers.{number}.{kind}") for kind in hooks.NORM_INPUTS])
            if writer:
                writer.save_tensors(f"residual-{number}", found[number])
    for number in range(len(loaded.layers)):
        if writer:
            found[number] = writer.load_tensors(f"residual-{number}")
            writer.drop(f"residual-{number}")
    lines = [found[number] for number in range(len(loaded.layers))]
    residual = {name: torch.cat([line[name] for line in lines]) for name in ("abs_max", "channel", "median")}
    return list(hooks.sites_of(loaded, *hooks.NORMS)), residual


def _extremes(residual: Tensor, tokens: int) -> Extremes:
    """Of a residual stream (windows' tokens, channels), one of `tokens` in all, each token's largest |value|,
    its channel, and the values of some tokens for the median."""
    magnitude = residual.abs()
    step = max(1, tokens * residual.shape[1] // _MEDIAN_SAMPLE)
    return (*magnitude.max(-1), magnitude[::step])


def _joined(sites: list[list[Extremes]]) -> dict[str, Tensor]:
    """What is said of the residual stream before a layer's norms, all windows in a row."""
    columns = [[torch.cat(parts) for parts in zip(*windows, strict=True)] for windows in sites]
    abs_max, channel = (torch.stack([site[n] for site in columns]) for n in (0, 1))
    return {"abs_max": abs_max, "channel": channel, "median": torch.stack([x.median() for *_, x in columns])}
