"""What a model remembers: second moments of what its layers see, and the projectors made from them."""

from cl_kernels.subspace.store import SideReport, SubspaceStore

__all__ = ["SideReport", "SubspaceStore"]
