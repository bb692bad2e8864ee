"""A few steps of a recipe at several widths and under several strategies, held against one of these runs.

docs/equivalence.md says why they are equal, and what cannot be.
"""

from __future__ import annotations

import math
import re
import shutil
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from distft.commands.launch import Launch
from distft.config import batch
from distft.config.loading import DATA_FILES, load_recipe
from distft.config.recipe import Recipe, Strategy
from distft.config.schema_text import closest, did_you_mean
from distft.data import rows
from distft.errors import DistftError, PlanError, RunError
from distft.jobs.target import Target
from distft.models.shapes import ModelShape, read_model_shape
from distft.planner.plan import RecipePlan, make_plan, misfit
from distft.runs.directory import RunDir
from distft.runs.metrics import read_metrics
from distft.runs.status import State, read_status
from distft.runs.stop_file import stop_asked
from distft.strategies.kinds import KINDS

if TYPE_CHECKING:
    from rich.console import Console

STRATEGIES = (*get_args(Strategy), "auto")
USUAL = ("ddp", "zero2", "zero3", "fsdp")
COLUMNS = ("loss", "grad_norm")
# Largest differences to be expected, as the tests hold them: of float32, of 8-bit optimizer states, of 16 bit.
FLOAT32, EIGHT_BIT, HALF = 1e-5, 1e-3, 2e-2
NOTHING_TO_SHARD = "one rank has nothing to shard"


@dataclass(frozen=True)
class Trial:
    """One run that was planned."""

    recipe: Recipe
    plan: RecipePlan

    @property
    def strategy(self) -> str:
        return self.plan.chosen.name

    @property
    def ranks(self) -> int:
        return self.plan.topology.world_size

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"{self.strategy.replace('+', '-')}-x{self.ranks}"

    def __str__(self) -> str:
        return f"{self.strategy} on {_ranks(self.ranks)}"


@dataclass(frozen=True)
class LeftOut:
    """Strategies that cannot run on so many ranks, and why."""

    strategies: tuple[str, ...]
    ranks: int
    reason: str


@dataclass(frozen=True)
class Verification:
    """What is to be run, the reference first. `tolerance`: the largest difference that counts as equal."""

    trials: tuple[Trial, ...]
    left_out: tuple[LeftOut, ...]
    steps: int
    tolerance: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """A run that has ended. `metrics`: its metrics.jsonl; `failure`: why it failed; `seconds`: start-up included."""

    trial: Trial
    metrics: tuple[dict[str, Any], ...]
    wrapped: str
    seconds: float
    failure: str | None = None

    def column(self, name: str) -> list[float | None]:
        return [line[name] for line in self.metrics]


@dataclass(frozen=True)
class Difference:
    """The largest difference of a run from the reference: its size, of which column and step. Infinite for a NaN."""

    size: float
    column: str
    step: int
    outcome: Outcome


@dataclass(frozen=True)
class Result:
    """All runs of a verification, the reference first."""

    verification: Verification
    outcomes: tuple[Outcome, ...]

    @property
    def reference(self) -> Outcome:
        return self.outcomes[0]

    def difference(self, outcome: Outcome, column: str) -> Difference | None:
        """None where there is nothing to compare: a run that failed, or gradient norms that are not measured."""
        if outcome.failure:
            return None
        found = [
            Difference(_distance(column, here[column], there[column]), column, here["step"], outcome)
            for here, there in zip(outcome.metrics, self.reference.metrics, strict=True)
            if None not in (here[column], there[column])
        ]
        return max(found, key=lambda difference: difference.size, default=None)

    @cached_property
    def largest(self) -> Difference | None:
        """Of all runs; None where all failed."""
        found = [self.difference(outcome, column) for outcome in self.outcomes[1:] for column in COLUMNS]
        return max(filter(None, found), key=lambda difference: difference.size, default=None)

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.failure]

    @property
    def same(self) -> bool:
        return not self.failed and self.largest.size <= self.verification.tolerance


# ---- what is asked


def parse_world_sizes(text: str) -> list[int]:
    """`1,2,4` → numbers of ranks.

    Raises:
        DistftError: a word that is no width, or one that comes twice.
    """
    words = _words("--world-sizes", text)
    for word in words:
        if not re.fullmatch(r"[1-9][0-9]{0,5}", word):
            raise DistftError(f"--world-sizes: got {word!r}, need numbers of ranks >= 1, such as 1,2,4")
    return [int(word) for word in words]


def parse_strategies(text: str) -> list[str]:
    """`ddp,zero3` → strategies.

    Raises:
        DistftError: a word that is none, or one that comes twice.
    """
    words = _words("--strategies", text)
    for word in words:
        if word not in STRATEGIES:
            guess = did_you_mean(closest(word, STRATEGIES))
            raise DistftError(f"--strategies: got {word!r}, need some of {', '.join(STRATEGIES)}{guess}")
    return words


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if twice := [word for n, word in enumerate(words) if word in words[:n]]:
        raise DistftError(f"{option}: got {twice[0]!r} twice")
    return words


# ---- the plan


def plan(
    path: str,
    sets: Sequence[str],
    widths: Sequence[int],
    strategies: Sequence[str] | None,
    steps: int,
    tolerance: float | None = None,
) -> Verification:
    """Plan every run, here; nothing is written or started.

    The reference is ddp on the first width, whether it was asked for or not; where it cannot run, the first that can.

    Args:
        strategies: None for the usual ones and the recipe's own.
        steps: of each run.
        tolerance: None for what the recipe's precision and optimizer allow.

    Raises:
        DistftError: a recipe, width, model or data that cannot be used, or fewer than two runs to compare.
    """
    recipe = load_recipe(path, sets, needed=DATA_FILES)
    _check_world_sizes(recipe, widths)
    model = read_model_shape(recipe, need_weights=True)
    rows.check_files(recipe)
    allowed, notes, mends = _unequal(recipe, model)
    changes = [*sets, *_short(steps), *mends]
    asked = [("ddp", widths[0], ["parallelism.offload=none"])]
    for ranks in widths:
        asked += [(name, ranks, []) for name in strategies or dict.fromkeys((*USUAL, recipe.parallelism.strategy))]
    trials: dict[tuple[str, int], Trial] = {}
    refused: dict[tuple[int, str], list[str]] = {}
    for name, ranks, more in asked:
        if (name, ranks) in trials:
            continue
        try:
            trial = _trial(path, [*changes, *more], name, ranks, usual=strategies is None)
            trials.setdefault((trial.strategy, ranks), trial)
        except PlanError as error:
            names = refused.setdefault((ranks, "; ".join(str(error).splitlines())), [])
            names += [name] if name not in names else []
    left_out = tuple(LeftOut(tuple(names), ranks, reason) for (ranks, reason), names in refused.items())
    if len(trials) < 2:
        raise PlanError(
            "\n".join(
                [
                    "nothing to compare: fewer than two runs are left; name other --world-sizes or --strategies",
                    *_left_out_lines(left_out),
                ]
            )
        )
    return Verification(tuple(trials.values()), left_out, steps, allowed if tolerance is None else tolerance, notes)


def _check_world_sizes(recipe: Recipe, widths: Sequence[int]) -> None:
    """Raises PlanError with all widths that this machine or the batch does not allow."""
    total, micro, problems = recipe.training.global_batch_size, recipe.training.micro_batch_size, []
    for ranks in widths:
        try:
            Target(1, ranks).where()
            batch.per_rank(total, ranks) if micro == "auto" else batch.fixed(total, micro, ranks)
        except DistftError as error:
            problems.append(f"--world-sizes: {ranks}: {error}")
    if problems:
        raise PlanError("\n".join(problems))


def _short(steps: int) -> list[str]:
    """What makes a short run of a recipe: nothing beside its steps."""
    return [
        f"training.max_steps={steps}",
        "training.num_train_epochs=null",
        "training.eval_steps=null",
        "training.report_to=[]",
        "data.eval=null",
        "checkpoint={}",
    ]


def _trial(path: str, sets: Sequence[str], strategy: str, ranks: int, usual: bool) -> Trial:
    """Raises PlanError where it cannot run, or would be another run once more."""
    recipe = load_recipe(path, [*sets, f"parallelism.strategy={strategy}"])
    made = make_plan(recipe, Target(1, ranks).where(), need_weights=True)
    if strategy not in ("auto", made.strategy):  # fsdp on one rank is planned as ddp
        raise PlanError(NOTHING_TO_SHARD)
    if usual and ranks == 1 and not KINDS[made.strategy].replicates and made.offload == "none":
        raise PlanError(NOTHING_TO_SHARD)
    if not made.fits:
        raise PlanError(misfit(made.chosen))
    return Trial(recipe, made)


def _unequal(recipe: Recipe, model: ModelShape) -> tuple[float, tuple[str, ...], list[str]]:
    """What cannot be equal: the difference that it allows, sentences that name it, and overrides that take it away."""
    allowed, notes, mends = FLOAT32, [], []
    optim = str(recipe.trainer.overrides.get("optim", recipe.training.optim))
    if "8bit" in optim:
        allowed = EIGHT_BIT
        notes.append(
            f"training.optim: {optim} rounds its states in blocks, and sharding moves the blocks' borders: "
            f"differences of up to {EIGHT_BIT:g} are allowed"
        )
    precision = recipe.training.mixed_precision
    if precision != "no":
        allowed = HALF
        size = {"bf16": "2^-8 (0.4%)", "fp16": "2^-11 (0.05%)"}[precision]
        notes.append(
            f"training.mixed_precision: {precision} rounds every number to {size} of itself, and sums in another order "
            f"round otherwise: differences of up to {HALF:g} are allowed"
        )
    if recipe.lora and recipe.lora.lora_dropout:
        mends.append("lora.lora_dropout=0")
        notes.append(
            f"lora.lora_dropout: {recipe.lora.lora_dropout:g} in the recipe, 0 here: each rank draws its own masks, so "
            "no two widths drop the same"
        )
    drawn = [f"{key} {value:g}" for key, value in model.config.items() if _is_dropout(key, value)]
    if drawn:
        notes.append(
            f"config.json of the model: {', '.join(drawn)}: each rank draws its own masks, so the widths will differ; "
            "what they show here is that, not an error"
        )
    return allowed, tuple(notes), mends


def _is_dropout(key: str, value: Any) -> bool:
    named = "dropout" in key or key.endswith("_pdrop")
    return named and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


# ---- the runs


def run(verification: Verification, folder: Path, console: Console, keep: bool) -> Result:
    """Run one after the other, in `folder`; says on `console` what runs. Without `keep` no run directory stays.

    Raises:
        RunError: the reference failed, or a signal came; the run that was going on has ended.
    """
    from rich.console import Console

    from distft.views.progress import say

    outcomes: list[Outcome] = []
    quiet, trials = Console(quiet=True), verification.trials
    for number, trial in enumerate(trials, 1):
        with console.status(f"{number}/{len(trials)}  {trial}"):
            outcome = _run(trial, folder, quiet, keep, outcomes[0] if outcomes else None)
        outcomes.append(outcome)
        word = "failed after " * bool(outcome.failure)
        say(console, [f"{number}/{len(trials)}  {trial}: {word}{outcome.seconds:.0f} s"])
    return Result(verification, tuple(outcomes))


def _run(trial: Trial, folder: Path, quiet: Console, keep: bool, reference: Outcome | None) -> Outcome:
    settings = trial.recipe.model_copy(update={"name": trial.name, "output_dir": str(folder)})
    runs: list[RunDir] = []
    failure, began = None, time.monotonic()
    try:
        Launch(settings, trial.plan, Target(1, trial.ranks)).start(quiet, runs.append)
    except RunError as error:
        if not runs:
            raise
        failure = str(error)
    (made,) = runs
    status = read_status(made)
    if stop_asked(made) or status.state in (State.CANCELLED, State.STOPPED):  # a run may complete all the same
        raise RunError(f"stopped at {trial}; nothing was compared")
    metrics = tuple(read_metrics(made.metrics)[0])
    if failure and not keep:
        lines = [line for line in failure.splitlines() if not line.startswith("log: ")]
        failure = "\n".join([*lines, "--keep DIR keeps its logs"])
    if not keep:
        shutil.rmtree(made.path, ignore_errors=True)
    if failure and reference is None:
        raise RunError(f"{trial}, which the others are compared with, failed:\n{failure}")
    rows = [(line["step"], line["tokens"]) for line in metrics]
    if not failure and reference and rows != [(line["step"], line["tokens"]) for line in reference.metrics]:
        failure = "it made other steps than the reference, or saw other rows"
    wrapped = status.ran.get("wrapped", "")
    return Outcome(trial, metrics, wrapped, time.monotonic() - began, failure)


def _distance(column: str, here: float, there: float) -> float:
    """Between losses; between gradient norms, relative to what is above 1. Infinite where one is not a number."""
    scale = max(1.0, abs(there)) if column == "grad_norm" else 1.0
    distance = abs(here - there) / scale
    return distance if math.isfinite(distance) else math.inf


# ---- what is said of them


def lines(result: Result, width: int) -> list[str]:
    """The table, what is left out and what cannot be equal, and the verdict last; `width` in characters."""
    verification = result.verification
    rows = [("strategy", "ranks", "wrapped by", "loss 1", f"loss {verification.steps}", "Δ loss", "Δ norm")]
    for outcome in result.outcomes:
        rows.append((outcome.trial.strategy, str(outcome.trial.ranks), outcome.wrapped, *_cells(result, outcome)))
    found = _table(rows, width)
    text = [
        f"Δ: the largest difference of any step from {result.reference.trial}, of the loss and of the gradient's norm "
        "(above 1: relative to it)",
        f"learning rate: the schedule of a run of {verification.steps} steps, in all runs alike",
        *_left_out_lines(verification.left_out),
        *(f"not equal: {note}" for note in verification.notes),
    ]
    found += ["", *(part for line in text for part in _fill(line, width))]
    for outcome in result.failed:
        first, *rest = outcome.failure.splitlines()
        found += [*_fill(f"failed: {outcome.trial}: {first}", width), *rest]
    return [*found, *_fill(verdict(result), width)]


def verdict(result: Result) -> str:
    """The last line: whether it is the same training, and where it differs most."""
    if result.largest is None:
        return "nothing was compared: every run but the reference failed"
    found, allowed = result.largest, result.verification.tolerance
    place = f"{found.column} of step {found.step}, {found.outcome.trial}"
    size = f"largest difference {_size(found.size)} ({place})"
    if found.size > allowed:
        return f"{size} exceeds {allowed:.2g}: not the same training"
    if result.failed:
        return f"{size}, allowed {allowed:.2g}; {len(result.failed)} of {len(result.outcomes)} runs failed"
    return f"{size}, allowed {allowed:.2g}: the same training"


def as_json(result: Result) -> dict[str, Any]:
    """The same for programs, with the losses of all steps; null for what is not a number or was not measured."""
    verification, largest = result.verification, result.largest
    return {
        "same": result.same,
        "tolerance": verification.tolerance,
        "steps": verification.steps,
        "largest": largest
        and {
            "difference": _finite(largest.size),
            "column": largest.column,
            "step": largest.step,
            "strategy": largest.outcome.trial.strategy,
            "ranks": largest.outcome.trial.ranks,
        },
        "runs": [
            {
                "strategy": outcome.trial.strategy,
                "ranks": outcome.trial.ranks,
                "wrapped": outcome.wrapped,
                "reference": outcome is result.reference,
                "loss": [_finite(value) for value in outcome.column("loss")],
                "grad_norm": [_finite(value) for value in outcome.column("grad_norm")],
                "tokens": outcome.column("tokens"),
                **{f"{column}_difference": _json_difference(result, outcome, column) for column in COLUMNS},
                "seconds": outcome.seconds,
                "failure": outcome.failure,
            }
            for outcome in result.outcomes
        ],
        "left_out": [
            {"strategy": strategy, "ranks": left.ranks, "reason": left.reason}
            for left in verification.left_out
            for strategy in left.strategies
        ],
        "not_equal": list(verification.notes),
    }


def _cells(result: Result, outcome: Outcome) -> tuple[str, str, str, str]:
    if outcome.failure:
        return "failed", "", "", ""
    losses = outcome.column("loss")
    ends = (f"{losses[0]:.6f}", f"{losses[-1]:.6f}")
    if outcome is result.reference:
        return (*ends, "-", "-")
    found = [result.difference(outcome, column) for column in COLUMNS]
    return (*ends, *(_size(difference.size) if difference else "" for difference in found))


def _table(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Aligned; where there is no room, what wrapped the model stands in a line of its own."""
    found = _aligned(rows, words=(0, 2))
    if max(map(len, found)) <= width:
        return found
    narrow = _aligned([(*row[:2], *row[3:]) for row in rows], words=(0,))
    return [part for line, row in zip(narrow, rows, strict=True) for part in (line, f"  {row[2]}") if part.strip()]


def _aligned(rows: Sequence[tuple[str, ...]], words: Sequence[int]) -> list[str]:
    """The columns `words` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if n in words else '>'}{widths[n]}}" for n, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def _left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    return [f"left out: {', '.join(left.strategies)} on {_ranks(left.ranks)}: {left.reason}" for left in left_out]


def _fill(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def _size(value: float) -> str:
    return f"{value:.1e}" if value and math.isfinite(value) else f"{value:g}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _json_difference(result: Result, outcome: Outcome, column: str) -> float | None:
    found = result.difference(outcome, column)
    return found and _finite(found.size)
