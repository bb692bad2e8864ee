"""status, logs, cancel: runs that were started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from distft.cli import options

if TYPE_CHECKING:
    from distft.runs.directory import RunDir
    from distft.runs.status import Status


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@options.runs_dir
@options.JSON
def status(runs: tuple[str, ...], output_dir: str, as_json: bool) -> None:
    """Show the state of RUN, or of every run.

    RUN may be a sweep too.
    """
    from distft.commands import sweep
    from distft.commands.follow import described
    from distft.runs.directory import RunDir
    from distft.schedulers import dispatch
    from distft.views.summary import beside_plan, beside_plan_lines

    folder = Path(output_dir)
    if runs:
        places = dict.fromkeys(path for word in runs for path in (Path(word), folder / word))
        sweeps = [path for path in places if sweep.is_sweep(path)]
        found = [RunDir.find(word, output_dir) for word in runs if not {Path(word), folder / word} & {*sweeps}]
    else:
        sweeps = sweep.all_in(folder)
        found = RunDir.all_in(output_dir)
    if sweeps and runs and not as_json:
        for path in sweeps:
            click.echo("\n".join(sweep.table(path)))
    else:
        found += [run for path in sweeps for run in sweep.runs_of(path)]
    statuses = dispatch.statuses_now(found)
    measured = beside_plan if runs else lambda run: {}  # of all runs it would take seconds
    if as_json:
        answer = [described(run, state) | measured(run) for run, state in zip(found, statuses, strict=True)]
        options.print_json({"runs": answer})
        return
    if not found and not sweeps:
        click.echo(f"no runs in {output_dir}/")
    for run, state in zip(found, statuses, strict=True):
        click.echo(_line(run, state))
        if runs:
            problem = [f"  {state.checkpoint_problem}"] if state.checkpoint_problem else []
            warnings = [f"  warning: {text}" for text in state.warnings]
            for line in [*_attempts(run, state), *problem, *warnings, *beside_plan_lines(run)]:
                click.echo(line)


def _line(run: RunDir, status: Status) -> str:
    from distft.views.summary import eval_losses, loss_name

    step = f"step {status.step}/{status.max_steps}" if status.max_steps else ""
    losses = eval_losses(status)
    expected = f"expected to start {status.expected_start}" if status.expected_start else ""
    state = "damaged" if status.damaged else str(status.state or "unknown")
    trained = f"trained on {loss_name(status.loss_type)}" if status.loss_type else ""
    trained_to = losses and f"eval loss {losses}"
    parts = (f"{run.name:<24} {state:<10}", step, trained, trained_to, status.damaged, status.reason, expected)
    return "  ".join(part for part in parts if part).rstrip()


def _attempts(run: RunDir, status: Status) -> list[str]:
    """How the attempts that ended did."""
    lines = []
    for number, attempt in enumerate(status.attempts, 1):
        node = f" on {attempt.node}" if attempt.node else ""
        lines.append(f"  attempt {number} ended after step {attempt.step}{node}: {attempt.reason}")
        if attempt.logs and (logs := run.logs / attempt.logs).is_dir():
            lines.append(f"    logs: {logs}")
    return lines


@click.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Keep printing until the run ends.")
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True, help="Whose log.")
@click.option(
    "--failed", is_flag=True, help="Print why it failed instead, or how the attempts of a run that continued ended."
)
@options.runs_dir
def logs(run: str, follow: bool, rank: int, failed: bool, output_dir: str) -> None:
    """Print the log of a rank of RUN.

    While there are no ranks yet, it is the log of the job.
    """
    from distft.commands.follow import follow_log
    from distft.errors import RecipeError
    from distft.runs.directory import RunDir
    from distft.runs.failure import job_logs

    found = RunDir.find(run, output_dir)
    if failed:
        click.echo(_why_failed(found))
        return
    path = found.rank_log(rank)
    if not path.exists() and not follow:
        before_ranks = job_logs(found)
        if before_ranks and not any(found.logs.glob("rank-*.log")):  # still in its setup or preflight, or failed there
            path = before_ranks[-1]
    if not path.exists() and not follow:
        ranks = sorted(int(p.stem.removeprefix("rank-")) for p in found.logs.glob("rank-*.log"))
        have = f"has logs of {', '.join(map(str, ranks))}" if ranks else "has no rank's log yet"
        raise RecipeError(f"--rank: got {rank}; {found.path.name} {have}")
    for block in follow_log(found, path, to_the_end=follow):
        click.echo(block, nl=False)  # bytes: a character may continue in the next block


def _why_failed(run: RunDir) -> str:
    from distft.errors import RecipeError
    from distft.runs.failure import first_failure
    from distft.runs.status import State
    from distft.schedulers.dispatch import status_now

    status = status_now(run)
    if status.state is not State.FAILED:
        if not status.attempts:
            raise RecipeError(f"--failed: {run.path.name} has not failed, it is {status.state or 'unknown'}")
        return "\n".join(_attempts(run, status))
    reason = status.reason or "no reason is known"
    if not status.exit_status:
        return reason
    failure = first_failure(run, status.exit_status)
    return failure.text if failure.reason == reason else f"{reason}\n{failure.text}"  # the reason of several attempts


@click.command()
@click.argument("run")
@options.runs_dir
@options.JSON
def cancel(run: str, output_dir: str, as_json: bool) -> None:
    """End RUN and all its processes."""
    from distft.commands.follow import described
    from distft.runs.directory import RunDir
    from distft.schedulers import dispatch

    found = RunDir.find(run, output_dir)
    dispatch.cancel(found)
    status = dispatch.status_now(found)
    if as_json:
        options.print_json(described(found, status))
    else:
        click.echo(_line(found, status))
