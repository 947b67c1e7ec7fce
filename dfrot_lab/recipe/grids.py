"""How one tensor is quantized, said immutably; and the grids that are the defaults."""

from dfrot_lab.recipe.base import Spec, one_of, ruled

SCHEMES = {"symmetric": "sym", "asymmetric": "asym", "free": "free"}
"""Ranges and short names: in asymmetric 0 always lies (released code), free is min to max (DFRot, Eq. 5)."""
GRANULARITIES = {
    "per_token": "", "per_channel": "-channel", "per_group": "-head", "per_tensor": "-tensor",
    "static": "-static",
}  # fmt: skip
"""What shares one scale, and its mark in a quantizer's name; a group of a given size is marked `-g128`."""
GROUPED = "a whole number >= 1, with granularity per_group"


class QuantSpec(Spec):
    """How one tensor is quantized; `bits=16`: not at all. `granularity` says what shares one scale: a token,
    a weight's output channel, a group of `group_size` channels (a head where none is given), the tensor; or,
    `static`, whatever passes one place in the model, by a scale that was found before it ran."""

    bits: int = ruled(4, "a whole number in 2..16", ge=2, le=16)
    scheme: str = one_of("symmetric", tuple(SCHEMES))
    clip_ratio: float = ruled(1.0, "in (0, 1]", gt=0, le=1)
    granularity: str = one_of("per_token", tuple(GRANULARITIES))
    group_size: int | None = ruled(None, GROUPED, ge=1)

    def _check(self) -> None:
        self._require("group_size", self.group_size is None or self.granularity == "per_group", GROUPED)

    @property
    def symmetric(self) -> bool:
        """Whether the range is symmetric about 0, so that the zero point is 0."""
        return self.scheme == "symmetric"

    @property
    def name(self) -> str:
        """Short name for tables: `sym4`, `asym4-c0.9`, `sym4-channel`, `asym4-g128`; `none` at 16 bits."""
        if self.bits == 16:
            return "none"
        clip = f"-c{self.clip_ratio}" if self.clip_ratio != 1 else ""
        shared = f"-g{self.group_size}" if self.group_size else GRANULARITIES[self.granularity]
        return f"{SCHEMES[self.scheme]}{self.bits}{clip}{shared}"


SYM4 = QuantSpec()  # symmetric, 4 bits, a scale a token: what the paper's errors are measured with
ACTIVATIONS = QuantSpec(scheme="asymmetric")
KV_CACHE = QuantSpec(bits=16, scheme="asymmetric", granularity="per_group")  # a scale a token and head
