"""status, logs, cancel: runs that were started."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

from distft.cli import options

FOLLOW_SECONDS = 0.3


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@options.runs_dir
@options.JSON
def status(runs: tuple[str, ...], output_dir: str, as_json: bool) -> None:
    """Say how RUN, a sweep, or every run of the output folder is doing."""
    from distft.commands import sweep
    from distft.commands.follow import describe_runs
    from distft.runs.directory import SWEEP, RunDir

    folder = Path(output_dir)
    places = dict.fromkeys(path for word in runs for path in (Path(word), folder / word))
    sweeps = [path for path in places if sweep.runs_of(path)]
    if sweeps and not as_json:
        for path in sweeps:
            click.echo("\n".join(sweep.table(path)))
    words = [word for word in runs if not {Path(word), folder / word} & {*sweeps}]
    found = [RunDir.find(word, output_dir) for word in words]
    if not runs:
        found = [RunDir(path.parent.absolute()) for path in sorted(folder.glob("*/status.json"))]
        sweeps = [path.parent for path in sorted(folder.glob(f"*/{SWEEP}"))]
    if not runs or as_json:
        found += [run for path in sweeps for run in sweep.runs_of(path)]
    described = describe_runs(found)
    named = {str(run.path): run for run in found} if runs else {}  # of all runs it would take seconds
    if as_json:
        from distft.views.summary import beside_plan

        described = [run | (beside_plan(named[run["run_dir"]]) if named else {}) for run in described]
        options.print_json({"runs": described})
        return
    if not described and not sweeps:
        click.echo(f"no runs in {output_dir}/")
    for run in described:
        click.echo(_line(run))
        if named:
            from distft.views.summary import beside_plan_lines

            problem = [f"  {run['checkpoint_problem']}"] if run.get("checkpoint_problem") else []
            for line in [*_attempts(run), *problem, *beside_plan_lines(named[run["run_dir"]])]:
                click.echo(line)


def _line(run: dict[str, Any]) -> str:
    step = f"step {run['step']}/{run['max_steps']}" if run.get("max_steps") else ""
    eval_loss = f"eval loss {run['eval_loss_before']:.4f}" if "eval_loss_before" in run else ""
    if run.get("eval_loss_after") is not None:
        eval_loss += f" -> {run['eval_loss_after']:.4f}"
    expected = f"expected to start {run['expected_start']}" if run.get("expected_start") else ""
    parts = [f"{run['run']:<24} {run['state'] or 'unknown':<10}", step, eval_loss, run.get("reason") or "", expected]
    return "  ".join(part for part in parts if part).rstrip()


def _attempts(run: dict[str, Any]) -> list[str]:
    """How those that ended did."""
    lines = []
    for number, attempt in enumerate(run.get("attempts") or [], 1):
        node = f" on {attempt['node']}" if attempt["node"] else ""
        lines.append(f"  attempt {number} ended after step {attempt['step']}{node}: {attempt['reason']}")
        if (logs := Path(run["run_dir"], "logs", attempt["logs"])).is_dir():
            lines.append(f"    logs: {logs}")
    return lines


@click.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True, help="Whose log.")
@click.option("--failed", is_flag=True, help="Why it failed instead; of a run that went on, how its attempts ended.")
@options.runs_dir
def logs(run: str, follow: bool, rank: int, failed: bool, output_dir: str) -> None:
    """Print the log of a rank of RUN; of its job, while there are no ranks yet."""
    from distft.commands.follow import SLURM_SECONDS
    from distft.errors import RecipeError
    from distft.runs.directory import FINISHED, RunDir, read_blocks
    from distft.runs.failure import first_failure
    from distft.schedulers.dispatch import state_now

    found = RunDir.find(run, output_dir)
    if failed:
        status = state_now(found)
        if status.get("state") != "failed":
            if not status.get("attempts"):
                raise RecipeError(f"--failed: {found.path.name} has not failed")
            click.echo("\n".join(_attempts(status | {"run_dir": found.path})))
        elif status.get("exit_status"):
            failure = first_failure(found, status["exit_status"])
            if status["reason"] != failure.reason:  # of several attempts
                click.echo(status["reason"])
            click.echo(failure.text)
        else:
            click.echo(status["reason"])
        return
    path = found.rank_log(rank)
    if not path.exists() and not follow:
        before_ranks = found.job_logs()
        if before_ranks and not any(found.logs.glob("rank-*.log")):  # still in its setup or preflight, or failed there
            path = before_ranks[-1]
    if not path.exists() and not follow:
        ranks = sorted(int(p.stem.removeprefix("rank-")) for p in found.logs.glob("rank-*.log"))
        raise RecipeError(
            f"--rank: got {rank}; {found.path.name} has logs of {', '.join(map(str, ranks)) or 'no rank yet'}"
        )
    offset, asked, wait = 0, -math.inf, SLURM_SECONDS if found.jobs() else 1.0
    while True:
        status = found.read_status()
        if status.get("state") not in FINISHED and time.monotonic() - asked > wait:
            status, asked = state_now(found), time.monotonic()
        ended = status.get("state") in FINISHED
        if path.exists():
            for block in read_blocks(path, offset):
                offset += len(block)
                click.echo(block, nl=False)  # as it is: a character may go on in the next block
        if not follow or ended:
            return
        time.sleep(FOLLOW_SECONDS)


@click.command()
@click.argument("run")
@options.runs_dir
@options.JSON
def cancel(run: str, output_dir: str, as_json: bool) -> None:
    """End RUN and all its processes."""
    from distft.commands.follow import describe_run
    from distft.runs.directory import RunDir
    from distft.schedulers import dispatch

    found = RunDir.find(run, output_dir)
    dispatch.cancel(found)
    described = describe_run(found)
    if as_json:
        options.print_json(described)
    else:
        click.echo(_line(described))
