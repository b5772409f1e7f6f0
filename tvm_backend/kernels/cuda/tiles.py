"""How products are cut into blocks: what can be chosen, and what has been found best for which linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tvm_backend.kernels.cuda.threads import WARP

#: Threads of a warp group, which multiplies 64 rows at a time, 64 codes deep.
GROUP, GROUP_ROWS, GROUP_DEPTH = 128, 64, 64
#: Bytes of shared memory that every GPU gives a block without being asked.
SHARED_MEMORY = 48 * 1024
#: Registers that the sums of a thread may take, of 255.
_SUMS = 128


@dataclass(frozen=True, order=True)
class Tile:
    """What a block computes at a time.

    Args:
        rows: of sums, a multiple of 16 for each warp along them.
        columns: of sums, a multiple of 32 for each warp along them.
        depth: of a step, a multiple of 32.
        row_warps: warps that share the rows.
        column_warps: warps that share the columns.
        stages: steps in shared memory, at least 2: products of one, the others on their way.
        groups: whether warps multiply in groups of four, as Hopper's can, with weights of 8 bits; at least 3 stages.

    Raises:
        ValueError: it cannot be written or does not fit a GPU.
    """

    rows: int
    columns: int
    depth: int
    row_warps: int
    column_warps: int
    stages: int
    groups: bool = False

    def __post_init__(self) -> None:
        counts = (self.rows, self.columns, self.depth, self.row_warps, self.column_warps)
        # 32 columns of a warp are 8 neighbours of a thread, and whole words of three-bit weights.
        whole = (
            all(count > 0 for count in counts)
            and self.rows % (16 * self.row_warps) == 0
            and self.columns % (32 * self.column_warps) == 0
            and self.depth % 32 == 0
            and self.stages >= 2
        )
        if not whole:
            raise ValueError(f"{self} is not made of whole products of 16 rows, 32 columns and 32 codes a warp")
        grouped = (
            self.row_warps * WARP % GROUP == 0
            and self.column_warps == 1
            and self.rows * GROUP == self.row_warps * WARP * GROUP_ROWS
            and self.columns <= 256
            and self.depth == GROUP_DEPTH
            and self.stages >= 3
        )
        if self.groups and not grouped:
            raise ValueError(f"{self} is not made of groups of four warps with 64 rows and 64 codes each")
        if self.threads > 1024 or 4 * self.row_tiles * self.column_tiles > _SUMS or self.shared_bytes > SHARED_MEMORY:
            raise ValueError(f"{self} takes more threads, registers or shared memory than a block has")

    @property
    def threads(self) -> int:
        """Of a block."""
        return WARP * self.row_warps * self.column_warps

    @property
    def row_tiles(self) -> int:
        """Of 16 rows, for each warp."""
        return self.rows // self.row_warps // 16

    @property
    def column_tiles(self) -> int:
        """Of 8 columns, for each warp."""
        return self.columns // self.column_warps // 8

    @property
    def shared_bytes(self) -> int:
        """Shared memory with weights of 8 bits."""
        return self.stages * self.depth * (self.rows + self.columns)


#: What a search looks at: small blocks fill a GPU with few rows, large ones read less for each product.
VARIANTS = (
    Tile(64, 64, 64, 2, 2, 3),
    Tile(32, 64, 64, 1, 2, 3),
    Tile(16, 64, 64, 1, 2, 4),
    Tile(32, 32, 64, 2, 1, 4),
    Tile(32, 128, 64, 1, 4, 3),
    Tile(64, 32, 64, 4, 1, 3),
    Tile(64, 64, 128, 2, 2, 2),
    Tile(64, 64, 64, 2, 2, 4),
    Tile(64, 128, 64, 2, 2, 3),
    Tile(64, 128, 64, 2, 4, 3),
    Tile(128, 64, 64, 4, 1, 3),
    Tile(128, 64, 64, 4, 2, 3),
    Tile(128, 128, 64, 2, 4, 3),
    Tile(128, 128, 64, 4, 2, 3),
    Tile(128, 128, 64, 4, 4, 2),
    Tile(128, 128, 64, 2, 2, 2),
    Tile(64, 64, 64, 4, 1, 4, groups=True),
    Tile(64, 128, 64, 4, 1, 4, groups=True),
    Tile(128, 64, 64, 8, 1, 4, groups=True),
    Tile(128, 128, 64, 8, 1, 3, groups=True),
)
DEFAULT = VARIANTS[0]


@dataclass(frozen=True, order=True)
class LinearShape:
    """What decides which tile is best, as far as it is known before a program runs.

    Args:
        columns: outputs.
        depth: inputs.
        bits: of the weights as stored: 8, 4 or 3.
    """

    columns: int
    depth: int
    bits: int


@dataclass(frozen=True)
class Tiles:
    """The tile of each linear.

    Args:
        chosen: of those that have one of their own.
        default: of the others.
    """

    chosen: Mapping[LinearShape, Tile] = field(default_factory=lambda: MappingProxyType({}))
    default: Tile = DEFAULT

    @property
    def groups(self) -> bool:
        """Whether any tile multiplies with groups of warps."""
        return any(tile.groups for tile in (self.default, *self.chosen.values()))

    def of(self, shape: LinearShape) -> Tile:
        """Return the tile of a linear."""
        tile = self.chosen.get(shape, self.default)
        return DEFAULT if tile.groups and shape.bits != 8 else tile

    def without_groups(self) -> Tiles:
        """Return the tiles for GPUs whose warps multiply each on its own."""
        plain = {shape: tile for shape, tile in self.chosen.items() if not tile.groups}
        return Tiles(MappingProxyType(plain), DEFAULT if self.default.groups else self.default)
