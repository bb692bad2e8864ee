"""merge."""

from __future__ import annotations

from pathlib import Path

import click

from distft.cli import options


@click.command()
@click.argument("run")
@click.option("-o", "--output", required=True, metavar="DIR", help="The new folder that is written.")
@click.option("--step", type=click.IntRange(min=1), help="The checkpoint of this step instead of final/.")
@options.runs_dir
@options.JSON
def merge(run: str, output: str, step: int | None, output_dir: str, as_json: bool) -> None:
    """Merge the adapter of RUN into its base model: a folder that transformers loads by itself.

    On the CPU, a tensor at a time. The result is compared with what was trained before DIR appears.
    """
    from distft.commands import merge
    from distft.runs.directory import RunDir

    merged = merge.merge(RunDir.find(run, output_dir), Path(output), step)
    if as_json:
        options.print_json(merged)
    else:
        click.echo("\n".join(merge.lines(merged)))
