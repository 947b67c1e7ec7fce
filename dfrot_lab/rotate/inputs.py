"""What linears read in full precision, layer by layer, for methods that find a turn (`model.turns`) for each
site; what is found is kept layer by layer, so that a stopped run goes on."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab.disk.artefacts import Writer
from dfrot_lab.model import door, hooks, turns
from dfrot_lab.model.stream import Walk
from dfrot_lab.model.turns import Turn
from dfrot_lab.recipe import keys
from dfrot_lab.rotate.transforms import Context, Transforms

log = logging.getLogger(__name__)
Find = Callable[[str, Tensor, list[nn.Linear]], Turn]
"""Of a site, its rows (tokens, channels) and the linears that read them: the turn."""


def found(kind: str, spec: Any, context: Context, find: Find, *, r3: bool) -> Transforms:
    """Of each site the turn that `find` makes of the text of the spec's `capture`, from the store or made
    now; no R1, R2 or R4, and R3 as said. A site that no token reaches has none, and is named."""
    spec = door.resolved(spec)

    def make(writer: Writer) -> None:
        writer.note.update(seconds=_walk(context, spec, find, writer))

    made = context.store.get_or_make(kind, lambda: keys.identity(spec, door.prints), make)
    steps = {key: step for name in made.names for key, step in made.tensors(name).items()}
    own = dict[str, list[Tensor]]()
    for key in sorted(steps):
        own.setdefault(key.rpartition(":")[0], []).append(steps[key])
    seconds = float(made.manifest["note"]["seconds"])
    return Transforms(R1=None, R2=None, turns=own, r3=r3, r4=False, seconds=seconds)


def _walk(context: Context, spec: Any, find: Find, writer: Writer) -> float:
    """Pass the text through the layers, and keep the turns of each; the seconds that took."""
    loaded, seen = context.model, dict[str, list[Tensor]]()

    def see(site: str, x: Tensor) -> None:
        seen.setdefault(site, []).append(x.detach().reshape(-1, x.shape[-1]).clone())

    ids = context.text(spec.capture).split(1)
    with torch.no_grad(), hooks.at_sites(loaded, see, hooks.sites_of(loaded, *hooks.LINEAR_INPUTS)):
        walk = Walk(loaded, ids, name=spec.name, writer=writer)
        for number in walk.layers():
            walk.step(number)
            if not writer.has(name := f"layer-{number:03d}"):
                writer.save_tensors(name, _of_layer(turns.readers(loaded, number), seen, find))
            seen.clear()
    return walk.seconds


def _of_layer(
    readers: Mapping[str, list[nn.Linear]], seen: Mapping[str, list[Tensor]], find: Find
) -> dict[str, Tensor]:
    """The steps of the turns of a layer's sites, by site and place."""
    kept, unseen = dict[str, Tensor](), list[str]()
    for site, linears in readers.items():
        rows = torch.cat(seen.get(site, [torch.empty(0)]))
        if not len(rows):
            unseen.append(site)
            continue
        turn = find(site, rows.to(torch.promote_types(rows.dtype, torch.float32)), linears)
        kept |= {f"{site}:{place}": step.cpu().contiguous() for place, step in enumerate(turn)}
    if unseen:
        log.warning("no token reached %d sites, which are not turned: %s", len(unseen), ", ".join(unseen))
    return kept
