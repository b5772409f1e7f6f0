"""Calibrated: a graph whose sites have number formats, and the float graph that it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from calibration.graph import Graph
from calibration.rules import Recipe
from calibration.sites import Edge, Site
from quantizers.codebook import CodebookQParams
from quantizers.row_relative import RowRelativeQParams
from quantizers.shiftmax import ShiftmaxQParams
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams

QParams = UniformQParams | CodebookQParams | RowRelativeQParams | ShiftmaxQParams


@dataclass(frozen=True, slots=True)
class CalibratedSite:
    """A site with its spec and the parameters that calibration chose."""

    site: Site
    spec: QuantSpec
    qparams: QParams


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A graph whose sites have number formats.

    Args:
        graph: the graph that is quantized. Rewrites and corrections of the recipe are in its constants; a corrected
            weight holds values of its format's grid.
        recipe: the recipe as resolved.
        sites: in execution order.
        num_images: how many calibration images were seen.
        fingerprint: SHA-256 over the SHA-256 of each calibration image as the network saw it, in order.
        float_constants: float values of the constants that rewrites and corrections replaced.
        rewritten_constants: what the rewrites made of constants, before any correction or rounding.
        notes: what calibration did besides choosing formats, and what it left, a line each.
    """

    graph: Graph
    recipe: Recipe
    sites: tuple[CalibratedSite, ...]
    num_images: int
    fingerprint: str
    float_constants: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    rewritten_constants: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    def by_edge(self) -> dict[Edge, QParams]:
        """Return the parameters by edge."""
        return {edge: entry.qparams for entry in self.sites for edge in entry.site.edges}

    def float_graph(self) -> Graph:
        """Return the graph as it was traced."""
        return dataclasses.replace(self.graph, constants={**self.graph.constants, **self.float_constants})

    def rewritten_graph(self) -> Graph:
        """Return the float graph with the rewrites of the recipe: the same function, in the coordinates of ``graph``.

        Its values are what those of ``graph`` would be without formats, rounding and corrections.
        """
        constants = {**self.graph.constants, **self.float_constants, **self.rewritten_constants}
        return dataclasses.replace(self.graph, constants=constants)
