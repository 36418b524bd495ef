"""Errors of the package. Each is a subclass of the built-in a caller would already catch."""

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "NonFiniteError",
    "SolverError",
    "SubspaceError",
    "SubspaceMismatchError",
]


class SubspaceError(ValueError):
    """A basis or projector is not what it claims to be, e.g. its columns are not orthonormal."""


class SubspaceMismatchError(ValueError):
    """A subspace store and a model do not fit: names missing, unknown, or of another size."""


class NonFiniteError(ArithmeticError):
    """A statistic or a loss holds NaN or infinity."""


class SolverError(RuntimeError):
    """Every rung of the eigensolver ladder failed."""


class BackendUnavailableError(RuntimeError):
    """A required implementation cannot run here; the message says why and what would help."""


class CheckpointError(RuntimeError):
    """A file is damaged, foreign, of another version, or belongs to another run."""
