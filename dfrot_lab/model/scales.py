"""A scale for each channel that a quantized linear reads, folded into what makes the channel (a norm's gain,
v_proj, up_proj) and out of the linear's own weights: free when the model runs (OSTQuant's S, arXiv
2501.13987; before R4 SmoothRot, 2506.05413).

Where channels are mixed by a rotation a token's rounding error is the same in all of them and grows with the
token's energy; in a channel whose weights have the energy w^2 it costs w^2. With scales s an input of
energies e^2 loses (sum e^2 s^2)(sum w^2 / s^2), which is least, (sum e w)^2, at s^2 = w / e (Cauchy and
Schwarz). Of the powers of that s, 0 to 1, a site gets the one with which its own grid loses least: a scale
also spreads an offset, which the grid had taken for nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.model import hooks
from dfrot_lab.model.families import heads_of
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.model.parts import Transform, edit, feeds, rounded
from dfrot_lab.model.prefix import after
from dfrot_lab.model.stream import Walk, change
from dfrot_lab.model.surgery import Blocks, fold_gains, hadamard
from dfrot_lab.recipe.grids import QuantSpec

KIND = "scales"
POWERS = tuple(step / 4 for step in range(5))
EVERY = 4  # of a text's tokens every so many are looked at
LEAST = 1e-3  # of the mean: an energy below it is taken for it, so that no scale is wild


@dataclass(frozen=True)
class Pair:
    """A linear that makes `channels`, its rows (channels,), each once or for several heads; the one that
    reads them, and of each of its inputs (inputs,) the channel."""

    makes: nn.Linear
    rows: Tensor
    reads: nn.Linear
    of: Tensor


def pairs(loaded: LoadedModel, number: int) -> dict[str, Pair]:
    """By site what a layer's o and down read, where a linear makes it channel by channel: values, and of an
    MLP with a gate what `up` makes."""
    layer, roles = loaded.layers[number], loaded.roles
    heads, kv_heads, head = heads_of(loaded.config)
    v, at, values = linear(layer, roles.v), f"layers.{number}.", torch.arange(kv_heads * head)
    rows = values if roles.v_rows is None else torch.tensor(roles.v_rows(loaded.config))
    of = values.view(kv_heads, 1, head).expand(-1, heads // kv_heads, -1).flatten()
    found = {f"{at}o_proj_in": Pair(v, rows, linear(layer, roles.o), of)}
    groups = roles.groups(layer)
    for before, (site, names) in zip(list(groups.values()), list(groups.items())[1:], strict=False):
        if not site.endswith("down_proj_in"):
            continue
        down, first = linear(layer, names[0]), [linear(layer, name) for name in before]
        width = down.weight.shape[1]
        if sum(len(one.weight) for one in first) == 2 * width:  # a gate and up, in one linear or in two
            up, every = first[-1], torch.arange(width)
            found[at + site] = Pair(up, every + len(up.weight) - width, down, every)
    return found


def find(
    loaded: LoadedModel, ids: Tensor, grid: QuantSpec, *, r4: bool = True, blocks: Blocks = (None, None),
    skip: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """By site the scales (channels,) float64 on a text `ids` (windows, window), but for the first tokens of
    each window to `skip`, of a model with R1 in its weights and R2 and R4 not yet; none for a site that has
    no gain or pair, or where none lowers the error. Geometric mean 1."""
    kinds = [kind for kind in hooks.LINEAR_INPUTS if r4 or kind != "down_proj_in"]
    turned: dict[str, Transform] = {
        "o_proj_in": partial(_by_head, heads_of(loaded.config)[2], blocks[0]),
        "down_proj_in": partial(hadamard, block=blocks[1]),
    }
    seen: dict[str, list[Tensor]] = {}

    def see(site: str, x: Tensor) -> None:
        rows = after(x, skip).reshape(-1, x.shape[-1])
        seen.setdefault(site, []).append(rows[::EVERY].float())

    found: dict[str, Tensor] = {}
    with hooks.at_sites(loaded, see, hooks.sites_of(loaded, *kinds)):
        walk = Walk(loaded, ids.split(1), name="scales")
        for number in walk.layers():
            walk.step(number)
            for site, (reads, of) in _readers(loaded, number).items():
                if site not in seen:  # no token reached it, or it is not turned
                    continue
                rows, turn = torch.cat(seen[site]), turned.get(site.rpartition(".")[2])
                rows = rows[rows.any(-1)]
                scale = best(rows, weight_energy(reads), of, grid, turn) if len(rows) else None
                if scale is not None:
                    found[site] = scale.cpu()
            seen.clear()
    return found


def _by_head(head: int, block: int | None, x: Tensor) -> Tensor:
    return hadamard(x.unflatten(-1, (-1, head)), block).flatten(-2)


def _readers(loaded: LoadedModel, number: int) -> dict[str, tuple[list[nn.Linear], Tensor]]:
    """By site that may have scales the linears that read it rounded (no router), and the channel of each
    input."""
    of, found = torch.arange(loaded.channels), dict[str, tuple[list[nn.Linear], Tensor]]()
    for site, (norm, reads) in ({} if loaded.roles.online else feeds(loaded, number)).items():
        if getattr(norm, "weight", None) is not None:
            found[site] = rounded(loaded, number, reads), of
    return found | {site: ([pair.reads], pair.of) for site, pair in pairs(loaded, number).items()}


def weight_energy(reads: list[nn.Linear]) -> Tensor:
    """w^2: of each input the energy of the weights that read it (inputs,) float64."""
    return torch.stack([one.weight.double().square().sum(0) for one in reads]).sum(0)


def best(
    rows: Tensor, w2: Tensor, of: Tensor, grid: QuantSpec, turn: Transform | None = None
) -> Tensor | None:
    """The scales (channels,) float64 of least error, every row (tokens, inputs) counting by its share: of
    inputs that are quantized on `grid` after `turn`; `w2` (inputs,) is `weight_energy`, `of` (inputs,) each
    input's channel. None: no scale is better than none."""
    of = of.to(rows.device)
    centred = rows if grid.symmetric or turn else rows - rows.mean(-1, keepdim=True)
    energy = rows.double().square().sum(-1, keepdim=True)
    full = balanced(_by_channel((centred.double().square() / energy).mean(0), of), _by_channel(w2, of))
    lost = list[float]()
    for power in POWERS:
        s = full[of] ** power
        x = rows * s.to(rows)
        error = squared_error(x if turn is None else turn(x), grid).double() / energy[:, 0]
        lost.append(float(error.mean() * (w2 / s.square()).mean()))
    power = POWERS[min(range(len(POWERS)), key=lost.__getitem__)]
    return full**power if power else None


def balanced(e2: Tensor, w2: Tensor) -> Tensor:
    """s = (w / e)^(1/2) for energies of inputs and weights (channels,), of geometric mean 1."""
    e2, w2 = (x.double().clamp(min=LEAST * float(x.mean())) for x in (e2, w2))
    s = (w2 / e2) ** 0.25
    return s / s.log().mean().exp()


def _by_channel(x: Tensor, of: Tensor) -> Tensor:
    return x.new_zeros(int(of.max()) + 1).index_add_(0, of, x)


def fold(loaded: LoadedModel, scales: Mapping[str, Tensor]) -> None:
    """Give channels at some sites scales (channels,), and take them out of the linears that read them, which
    leaves the model's function; after R1 and before R2 and R4."""
    fold_gains(loaded, {site: s for site, s in scales.items() if site.rpartition(".")[2] in hooks.NORMS})

    def fold_layer(number: int) -> None:
        for site, pair in pairs(loaded, number).items():
            if (s := scales.get(site)) is not None:
                s = s.to(loaded.device, torch.float64)
                edit(pair.makes, partial(_times, s, pair.rows), partial(_times, s, pair.rows))
                edit(pair.reads, partial(torch.div, other=s[pair.of]))

    change(loaded, fold_layer)


def _times(s: Tensor, rows: Tensor, w: Tensor) -> Tensor:
    w[rows] = w[rows] * (s if w.ndim == 1 else s[:, None])
    return w
