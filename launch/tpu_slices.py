"""TPU slices: their names, chips and figures, and devices to compile for them.

A slice is named by chip and shape, "v5e:4x4", or as Google Cloud names it, "v5e-16". The number in
Cloud's names counts chips for v5e and v6e, and TensorCores, two per chip, for v4 and v5p.
"""

import dataclasses
import math
import re

import jax
from jax.experimental import topologies

from maskdm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's figures from Google's documentation; the peak of its matmuls is in `flops`.

    Fields:
      hbm_gib: memory; the compiler keeps some of it for the runtime.
      hbm_gbps: memory bandwidth in 1e9 bytes/s.
      ici_gbps: one-way bandwidth of all links to other chips together, in 1e9 bytes/s.
      cores: TensorCores; JAX sees a chip as one device.
      shapes: shapes of the slices on offer, smallest first.
      largest: chips of the largest slice, if three multiples of 4 are a shape; 0: only `shapes`.
    """

    hbm_gib: int
    hbm_gbps: int
    ici_gbps: int
    cores: int
    shapes: tuple[str, ...]
    largest: int = 0


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    "16x16x16",
)  # fmt: skip

CHIPS = {
    "v4": Chip(32, 1200, 300, 2, _CUBES, 4096),
    "v5e": Chip(16, 819, 200, 1, _FLAT),
    "v5p": Chip(95, 2765, 600, 2, (*_CUBES, "16x16x24"), 6144),
    "v6e": Chip(32, 1638, 400, 1, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one kind, side by side."""

    kind: str  # a key of CHIPS
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """Google Cloud's name, with the shape: "v5e-16 (4x4)"."""
        return f"{self.kind}-{self.num_chips * self.chip.cores} ({'x'.join(map(str, self.shape))})"

    def devices(self) -> list[jax.Device]:
        """The slice's devices, for compiling only.

        Raises:
          ConfigError: if the installed libtpu does not know the slice.
        """
        options = {}
        if self.chip.cores > 1:
            options["chip_config_name"] = "megacore"  # without it, a v4 chip is two devices
        if self.num_chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        try:
            return topologies.get_topology_desc(name, platform="tpu", **options).devices
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"--topology {name} cannot be compiled for ({reason}); type another"
            ) from error


def parse(name: str) -> Slice:
    """The slice with a name such as "v5e:16x16", "v5e-256" or "v5p-128".

    Raises:
      ConfigError: if there is no such chip or slice.
    """
    match = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)+)|-(\d+))", name.replace("v5litepod", "v5e"))
    if match is None or match[1] not in CHIPS:
        raise ConfigError(
            f"--topology is {name!r}; expected a chip of {', '.join(CHIPS)} and a shape or a size; "
            "type --topology=v5e:4x4 or --topology=v5e-16"
        )
    kind, shape, size = match.groups()
    chip = CHIPS[kind]
    sizes = [_shape(s) for s in chip.shapes]
    if shape:
        wanted = _shape(shape)
        in_cubes = all(side > 0 and side % 4 == 0 for side in wanted) and len(wanted) == 3
        if wanted in sizes or (in_cubes and math.prod(wanted) <= chip.largest):
            return Slice(kind, wanted)
        cubes = f", or three multiples of 4 up to {chip.largest} chips" if chip.largest else ""
        raise ConfigError(
            f"--topology is {name!r}; expected a shape of {', '.join(chip.shapes)}{cubes}; "
            f"type --topology={kind}:{chip.shapes[3]}"
        )
    by_size = {math.prod(s) * chip.cores: s for s in sizes}
    if int(size) not in by_size:
        what = "TensorCores, two per chip" if chip.cores == 2 else "chips"
        raise ConfigError(
            f"--topology is {name!r}; expected {kind}- and a number of {what}: "
            f"{', '.join(map(str, by_size))}; type --topology={kind}-{list(by_size)[3]}"
        )
    return Slice(kind, by_size[int(size)])


def _shape(text):
    return tuple(int(side) for side in text.split("x"))
