"""The paper's Fig. 1 from a model's own roles: one layer, where R1 to R4 act, where values are rounded."""

import html
from collections.abc import Collection, Iterator

from dfrot_lab.model.families import Roles
from dfrot_lab.model.shapes import Shape
from dfrot_lab.show.theme import INK, MASSIVE_COLOUR

ROTATIONS = {"R1": "#0072B2", "R2": "#E69F00", "R3": "#CC79A7", "R4": "#117733"}
TURNS = {
    "R1": "residual stream",
    "R2": "values of each head",
    "R3": "queries and keys",
    "R4": "input of down",
}
ACTING = (*ROTATIONS, "R4 online")  # R4 has two halves: the one fused into down_proj, the one before it
WIRES = ("stream", "read", "down", "head")
"""What can be red: the residual stream; what linears read after a norm, what down_proj and lm_head read."""
INKED = f'fill="{INK}"'
STREAM, NORM, ROUND, READ, INNER, TOP = 330, 280, 223, 158, 116, 64  # heights, from below


def block_svg(
    roles: Roles, shape: Shape, *, on: Collection[str] = ACTING, broken: Collection[str] = (),
    rounded: bool = True,
) -> str:  # fmt: skip
    """One layer as an SVG picture, without scripts, fonts or links. Boxes are the model's own linears, marked
    by the rotations `on`, of ACTING, that are fused into them: below on the residual stream's side, above on
    the other. Diamonds act online, circles round where `rounded`; the wires `broken`, of WIRES, are red.
    ValueError: another name."""
    for field, said, known in (("on", on, ACTING), ("broken", broken, WIRES)):
        if wrong := set(said) - set(known):
            raise ValueError(f"{field} must be of {', '.join(known)}; got {', '.join(sorted(wrong))}")
    pen = _Pen(set(on), set(broken), rounded, roles.online)
    drawn = [*_stream(pen, roles, shape), *_attention(pen, roles), *_mlp(pen, roles), *_legend(pen)]
    says = (
        f"One of {shape.layers} layers; on: {', '.join(each for each in ACTING if each in on) or 'nothing'}"
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 396" role="img" style="max-width:960px" '
        f'font-family="sans-serif" text-anchor="middle"><title>{says}</title>'
        f'<rect width="960" height="396" rx="6" fill="#fff"/>{"".join(drawn)}</svg>'
    )


class _Pen:
    """Draws wires, boxes with the marks of what is fused into them, circles, diamonds."""

    def __init__(self, on: set[str], broken: set[str], rounded: bool, online: bool) -> None:
        self.on, self.broken, self.rounded, self.online = on, broken, rounded, online
        self.fused = "" if online else "R1"  # into what writes the stream, and the head

    def wire(self, path: str, name: str = "") -> str:
        colour, width = (MASSIVE_COLOUR, 3.5) if name in self.broken else (INK, 1.4)
        return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" class="wire {name}"/>'

    def text(self, x: float, y: float, words: str, *, size: int = 13, more: str = "") -> str:
        place = f'x="{x:g}" y="{y:g}" font-size="{size}"'
        return f"<text {place} {more or INKED}>{html.escape(words)}</text>"

    def box(self, x: float, y: float, words: str, width: float, *, above: str = "", below: str = "") -> str:
        across = f'x="{x - width / 2:g}" width="{width:g}"'
        drawn = f'<rect {across} y="{y - 15:g}" height="30" rx="4" fill="#EEF1F5" stroke="{INK}"/>'
        for name, top in ((above, y - 15), (below, y + 11)):
            if name in self.on:
                drawn += f'<rect {across} y="{top:g}" height="4" fill="{ROTATIONS[name]}" class="{name}"/>'
        return drawn + self.text(x, y + 5, words)

    def ring(self, x: float, y: float, words: str) -> str:
        circle = f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="#fff" stroke="{INK}"/>'
        return circle + self.text(x, y + 4, words, size=11)

    def rounds(self, x: float, y: float) -> str:
        return self.ring(x, y, "Q") if self.rounded else ""

    def diamond(self, x: float, y: float, name: str, acts: str) -> str:
        if acts not in self.on:
            return ""
        shape = f'<path d="M{x:g} {y - 13:g}l13 13l-13 13l-13 -13z" fill="{ROTATIONS[name]}" class="{name}"/>'
        return shape + self.text(x, y + 4, name, size=10, more='fill="#fff"')


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _stream(pen: _Pen, roles: Roles, shape: Shape) -> Iterator[str]:
    """From the embedding to the head, and the frame of what is repeated."""
    frame = f'<rect x="132" y="20" width="594" height="{STREAM - 4}" rx="10" fill="none"'
    yield f'{frame} stroke="#9AA5B1" stroke-dasharray="5 4"/>'
    experts = "; the MLP: each of the experts" if roles.experts else ""
    repeated = f"{shape.layers} layers of {shape.channels} channels{experts}"
    yield pen.text(716, 38, repeated, size=12, more='text-anchor="end"')
    yield pen.wire(f"M75 {STREAM}H803", "stream") + pen.wire(f"M803 {STREAM}H836", "head")
    yield pen.box(75, STREAM, "embedding", 84, above=pen.fused)
    yield pen.box(776, STREAM, "norm", 54) + pen.box(874, STREAM, "lm_head", 74, below=pen.fused)


def _read(pen: _Pen, x: float, norm: str, places: list[float]) -> Iterator[str]:
    """From the stream up through a norm and a rounding to the linears that read it."""
    fork = ROUND - 17
    yield pen.wire(f"M{x:g} {STREAM}V{NORM}")
    yield pen.wire(f"M{x:g} {NORM}V{fork}M{places[0]:g} {READ}V{fork}H{places[-1]:g}V{READ}", "read")
    yield pen.wire(f"M{x:g} {fork}V{READ}", "read") if len(places) != 2 else ""
    yield pen.box(x, NORM, "norm" if norm else "no norm", 62)
    yield pen.diamond(x, ROUND + 27, "R1", "R1") if pen.online else ""
    yield pen.rounds(x, ROUND)


def _write(pen: _Pen, x: float, name: str, width: float, above: str, wire: str = "") -> Iterator[str]:
    """From the top down through a rounding and a linear to the stream; where R1 acts online, past a norm."""
    yield pen.wire(f"M{x:g} {TOP + 20}V{READ}", wire) + pen.wire(f"M{x:g} {READ}V{STREAM}")
    yield pen.rounds(x, INNER + 4)
    yield pen.box(x, READ, _short(name), width, above=above, below=pen.fused)
    yield pen.box(x, NORM, "norm", 54) if pen.online else ""
    yield pen.ring(x, STREAM, "+")


def _attention(pen: _Pen, roles: Roles) -> Iterator[str]:
    """q, k, v, R3 and the cache, attention, o."""
    _, norm, names = roles.feeds[0]
    apart, places = len(names) == 3, [170.0, 238.0, 306.0]
    yield from _read(pen, 238, norm, places if apart else [238.0])
    yield "".join(pen.wire(f"M{x:g} {READ}V{TOP}") for x in places)
    yield "".join(pen.diamond(x, INNER, "R3", "R3") for x in places[:2])
    yield "".join(pen.rounds(x, TOP + 27) for x in places[1:])  # the cache
    for x, name in zip(places, names, strict=True) if apart else ((238.0, names[0]),):
        above = "R2" if name == roles.v else ""
        yield pen.box(x, READ, _short(name), 62 if apart else 198, below="R1", above=above)
    yield pen.wire(f"M238 {TOP}H384V{TOP + 20}")
    yield pen.box(238, TOP, "attention", 198)
    yield from _write(pen, 384, roles.o, 66, "R2")


def _mlp(pen: _Pen, roles: Roles) -> Iterator[str]:
    """gate and up, what multiplies them, R4, down."""
    _, norm, names = roles.feeds[1]
    places = [486.0, 562.0] if len(names) == 2 else [524.0]
    yield from _read(pen, 524, norm, places)
    for x, name in zip(places, names, strict=True):
        yield pen.wire(f"M{x:g} {READ}V{TOP}")
        yield pen.box(x, READ, _short(name), 70 if len(names) == 2 else 110, below="R1")
    yield pen.wire(f"M524 {TOP}H668V{TOP + 20}")
    is_gated = any("gate" in name for name in names)
    yield pen.box(524, TOP, "act(gate) \u00d7 up" if is_gated else "activation", 146)
    yield from _write(pen, 668, roles.down, 84, "R4", "down")
    yield pen.diamond(668, TOP + 22, "R4", "R4 online")


def _legend(pen: _Pen) -> Iterator[str]:
    said = 'text-anchor="start"'
    for place, (name, colour) in enumerate(ROTATIONS.items()):
        x = 40 + 182 * place
        yield f'<rect x="{x}" y="366" width="22" height="12" fill="{colour}"/>'
        yield pen.text(x + 28, 377, f"{name}: {TURNS[name]}", size=12, more=said)
    yield pen.rounds(784, 372) + pen.text(800, 377, "rounded" if pen.rounded else "", size=12, more=said)
