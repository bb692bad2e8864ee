"""`distft verify`: a few steps of a recipe at several world sizes and under several strategies, compared with one run.

docs/equivalence.md says why they are equal, and what cannot be.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from distft.commands.launch import RecipeLaunch
from distft.config import batch
from distft.config.loading import DATA_FILES, load_recipe
from distft.config.recipe import Recipe, Strategy
from distft.config.schema_text import closest, did_you_mean
from distft.data.reading import check_files
from distft.errors import DistftError, PlanError, RunError
from distft.jobs.planned import plan_any, with_packing
from distft.jobs.target import CHECKED_ROWS, Target
from distft.models.shapes import ModelShape, read_model_shape
from distft.planner.plan import RecipePlan, misfit
from distft.runs.comparison import Comparison, LeftOut, Outcome, on_ranks
from distft.runs.directory import RunDir
from distft.runs.metrics import read_metrics
from distft.runs.status import State, read_status
from distft.runs.stop_file import stop_asked
from distft.strategies.kinds import KINDS
from distft.views.comparison import left_out_lines

if TYPE_CHECKING:
    from rich.console import Console

STRATEGIES = (*get_args(Strategy), "auto")
USUAL = ("ddp", "zero2", "zero3", "fsdp")
# The largest differences to expect, which the tests assert too: in float32, with 8-bit optimizer states, in 16 bit.
FLOAT32, EIGHT_BIT, HALF = 1e-5, 1e-3, 2e-2
NOTHING_TO_SHARD = "one rank has nothing to shard"


@dataclass(frozen=True)
class Trial:
    """A planned run."""

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
        """The name of its run directory."""
        return f"{self.strategy.replace('+', '-')}-x{self.ranks}"

    def __str__(self) -> str:
        return on_ranks(self.strategy, self.ranks)


@dataclass(frozen=True)
class Verification:
    """Planned runs, the reference first. `tolerance`: the largest difference that counts as equal."""

    trials: tuple[Trial, ...]
    left_out: tuple[LeftOut, ...]
    steps: int
    tolerance: float
    notes: tuple[str, ...]


# ---- options


def parse_world_sizes(text: str) -> list[int]:
    """`1,2,4` → numbers of ranks.

    Raises:
        DistftError: a word that is not a number of ranks, or one that comes twice.
    """
    words = _words("--world-sizes", text)
    for word in words:
        if not re.fullmatch(r"[1-9][0-9]{0,5}", word):
            raise DistftError(f"--world-sizes: got {word!r}, need numbers of ranks >= 1, such as 1,2,4")
    return [int(word) for word in words]


def parse_strategies(text: str) -> list[str]:
    """`ddp,zero3` → strategies.

    Raises:
        DistftError: a word that is not a strategy, or one that comes twice.
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


# ---- planning


def plan(
    path: str,
    sets: Sequence[str],
    world_sizes: Sequence[int],
    strategies: Sequence[str] | None,
    steps: int,
    tolerance: float | None = None,
) -> Verification:
    """Plan every run, on this machine; nothing is written or started.

    The reference is ddp on the first world size, even if it was not asked for; where that cannot run, the first run
    that can.

    Args:
        strategies: None for the usual ones and the recipe's.
        steps: of each run.
        tolerance: None for what the recipe's precision and optimizer allow.

    Raises:
        DistftError: a recipe, world size, model or data that cannot be used, or fewer than two runs to compare.
    """
    recipe, unpacked = with_packing(load_recipe(path, sets, needed=DATA_FILES))
    _check_world_sizes(recipe, world_sizes)
    model = read_model_shape(recipe, need_weights=True)
    check_files(recipe, CHECKED_ROWS)
    allowed, notes, fixes = _unequal(recipe, model)
    notes = (*unpacked, *notes)
    changes = [*sets, *_short(steps), *fixes]
    asked = [("ddp", world_sizes[0], ["parallelism.offload=none"])]
    for ranks in world_sizes:
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
        fix = "name other --world-sizes or --strategies"
        problem = f"nothing to compare: fewer than two runs are left; {fix}"
        raise PlanError("\n".join([problem, *left_out_lines(left_out)]))
    return Verification(tuple(trials.values()), left_out, steps, allowed if tolerance is None else tolerance, notes)


def _check_world_sizes(recipe: Recipe, world_sizes: Sequence[int]) -> None:
    """Raises PlanError with all world sizes that this machine or the batch does not allow."""
    total, micro, problems = recipe.training.global_batch_size, recipe.training.micro_batch_size, []
    for ranks in world_sizes:
        try:
            Target(1, ranks).where()
            batch.per_rank(total, ranks) if micro == "auto" else batch.fixed(total, micro, ranks)
        except DistftError as error:
            problems.append(f"--world-sizes: {ranks}: {error}")
    if problems:
        raise PlanError("\n".join(problems))


def _short(steps: int) -> list[str]:
    """Overrides that make a short run of a recipe: its steps and nothing else."""
    return [
        f"training.max_steps={steps}",
        "training.num_train_epochs=null",
        "training.eval_steps=null",
        "training.report_to=[]",
        "data.eval=null",
        "checkpoint={}",
    ]


def _trial(path: str, sets: Sequence[str], strategy: str, ranks: int, usual: bool) -> Trial:
    """Raises PlanError where the run is not possible, or would repeat another."""
    recipe, _ = with_packing(load_recipe(path, [*sets, f"parallelism.strategy={strategy}"]))
    made = plan_any(recipe, Target(1, ranks).where(), need_weights=True)
    if strategy not in ("auto", made.strategy):  # fsdp on one rank is planned as ddp
        raise PlanError(NOTHING_TO_SHARD)
    if usual and ranks == 1 and not KINDS[made.strategy].replicates and made.offload == "none":
        raise PlanError(NOTHING_TO_SHARD)
    if made.fits is False:
        raise PlanError(misfit(made.chosen))
    return Trial(recipe, made)


def _unequal(recipe: Recipe, model: ModelShape) -> tuple[float, tuple[str, ...], list[str]]:
    """What cannot be equal: the difference to allow, notes that name it, and overrides that remove it."""
    allowed, notes, fixes = FLOAT32, [], []
    optim = recipe.optim
    if "8bit" in optim:
        allowed = EIGHT_BIT
        notes.append(
            f"training.optim: {optim} rounds its states in blocks, and sharding moves the borders of the blocks: "
            f"differences of up to {EIGHT_BIT:g} are allowed"
        )
    precision = recipe.training.mixed_precision
    if precision != "no":
        allowed = HALF
        size = {"bf16": "2^-8 (0.4%)", "fp16": "2^-11 (0.05%)"}[precision]
        notes.append(
            f"training.mixed_precision: {precision} rounds every number to within {size}, and sums in another order "
            f"round differently: differences of up to {HALF:g} are allowed"
        )
    if recipe.lora and recipe.lora.lora_dropout:
        fixes.append("lora.lora_dropout=0")
        notes.append(
            f"lora.lora_dropout: {recipe.lora.lora_dropout:g} in the recipe, 0 here: each rank draws its own masks, so "
            "no two world sizes drop the same"
        )
    drawn = [f"{key} {value:g}" for key, value in model.config.items() if _is_dropout(key, value)]
    if drawn:
        notes.append(
            f"config.json of the model: {', '.join(drawn)}: each rank draws its own masks, so losses differ between "
            "world sizes; that is no error"
        )
    return allowed, tuple(notes), fixes


def _is_dropout(key: str, value: Any) -> bool:
    named = "dropout" in key or key.endswith("_pdrop")
    return named and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


# ---- running


def run(verification: Verification, folder: Path, console: Console, keep: bool) -> Comparison:
    """Run all trials in `folder`, one after the other, and print on `console` what runs.

    Without `keep`, no run directory stays.

    Raises:
        RunError: the reference failed, or a signal came, and the run at that moment has ended.
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
    v = verification
    return Comparison(tuple(outcomes), v.steps, v.tolerance, v.left_out, v.notes)


def _run(trial: Trial, folder: Path, quiet: Console, keep: bool, reference: Outcome | None) -> Outcome:
    settings = trial.recipe.model_copy(update={"name": trial.name, "output_dir": str(folder)})
    runs: list[RunDir] = []
    failure, began = None, time.monotonic()
    try:
        RecipeLaunch(settings, trial.plan, Target(1, trial.ranks)).start(quiet, runs.append)
    except RunError as error:
        if not runs:
            raise
        failure = str(error)
    (made,) = runs
    status = read_status(made)
    if stop_asked(made) or status.state in (State.CANCELLED, State.STOPPED):  # a run that was stopped may complete
        raise RunError(f"stopped at {trial}; nothing was compared")
    metrics = tuple(read_metrics(made.metrics)[0])
    if failure and not keep:
        lines = [line for line in failure.splitlines() if not line.startswith("log: ")]
        failure = "\n".join([*lines, "--keep DIR keeps its logs"])
    if not keep:
        shutil.rmtree(made.path, ignore_errors=True)
    if failure and reference is None:
        raise RunError(f"{trial}, the reference, failed:\n{failure}")
    seen = [(line["step"], line["tokens"]) for line in metrics]
    if not failure and reference and seen != [(line["step"], line["tokens"]) for line in reference.metrics]:
        failure = "its steps or its rows are not those of the reference"
    wrapped = status.ran.get("wrapped", "")
    return Outcome(trial.strategy, trial.ranks, metrics, wrapped, time.monotonic() - began, failure)
