"""The proximal operator on blocks in planar form, for callers that keep their data planar."""

from prox24._core.planes import join, prox, split

__all__ = ["join", "prox", "split"]
