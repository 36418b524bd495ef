"""`cl-kernels bench`: the benchmarks of this machine's devices. Their words are defined beside them, for machines
without typer as well."""

import importlib
from typing import TYPE_CHECKING, Any

from cl_kernels.cli._errors import UsageError

if TYPE_CHECKING:
    import typer


def register(app: "typer.Typer") -> None:
    """Add the command."""
    from typer import Context, Exit

    everything: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @app.command(context_settings=everything, add_help_option=False)
    def bench(context: Context) -> None:
        """Check every kernel's output, time it against its baselines, compare with earlier runs (--help says more)."""
        raise Exit(suite().command(list(context.args), "cl-kernels bench"))


def suite() -> Any:
    """The benchmarks' module, which lies beside the package in a checkout and inside it once installed."""
    try:
        return importlib.import_module("cl_kernels.benchmarks.suite")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("cl_kernels.benchmarks"):
            raise
        raise UsageError(
            "the benchmarks are not installed beside this package: install it (pip install -e . in a checkout)"
        ) from error
