"""Thin adapters for other people's loops; each imports its library only when it is used.

`timm.register()` puts the optimizers into timm's factory; `avalanche.SubspacePlugin` gives an Avalanche strategy a
subspace that grows with each experience. Accelerate, Lightning, Mammoth, PILOT and torch's own engines need no adapter:
docs/optimizers.md has their recipes.
"""

from cl_kernels.integrations import avalanche, timm

__all__ = ["avalanche", "timm"]
