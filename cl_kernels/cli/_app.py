"""The typer application: its commands and how one is run."""

from typing import TYPE_CHECKING

from cl_kernels.cli import _errors, bench, compare, doctor, explain, inspection, study, train

if TYPE_CHECKING:
    import typer


def build() -> "typer.Typer":
    """A new application with every command."""
    import typer

    app = typer.Typer(
        name="cl-kernels",
        help="Projection-based continual learning of pre-trained transformers.",
        add_completion=False,  # it would write to the shell's start-up files
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and exit.")
    ) -> None:
        if version:
            from cl_kernels._version import __version__

            typer.echo(f"cl-kernels {__version__}")
            raise typer.Exit
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())
            raise typer.Exit(_errors.BAD_USAGE)

    train.register(app)
    study.register(app)
    compare.register(app)
    explain.register(app)
    bench.register(app)
    doctor.register(app)
    inspection.register(app)
    return app


def invoke(argv: list[str]) -> int:
    """Run the application on `argv`; errors propagate, `typer.Exit(n)` becomes the return value."""
    import typer

    outcome = typer.main.get_command(build()).main(args=argv, prog_name="cl-kernels", standalone_mode=False)
    if outcome == _errors.CONTROL_C:  # what typer makes of a KeyboardInterrupt
        raise KeyboardInterrupt
    return outcome if isinstance(outcome, int) else 0
