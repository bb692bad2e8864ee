"""merge."""

from __future__ import annotations

from pathlib import Path

import click

from distft.cli import options


@click.command()
@click.argument("run")
@click.option("-o", "--output", required=True, metavar="DIR", help="The new folder to write.")
@click.option("--step", type=click.IntRange(min=1), help="Merge the checkpoint of this step instead of final/.")
@options.runs_dir
@options.JSON
def merge(run: str, output: str, step: int | None, output_dir: str, as_json: bool) -> None:
    """Merge the adapter of RUN into its base model.

    DIR can then be loaded by transformers alone. Merging takes place on the CPU, one tensor at a time, and the result
    is compared with what was trained before DIR appears.
    """
    from distft.commands import merge
    from distft.runs.directory import RunDir

    merged = merge.merge(RunDir.find(run, output_dir), Path(output), step)
    if as_json:
        options.print_json(merged)
    else:
        click.echo("\n".join(merge.lines(merged)))
