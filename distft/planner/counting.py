"""Memory of a recipe's ranks by counting: from some steps that were traced (simulation/simulate.py), for any setting.

What a step keeps grows linearly with the rows of a micro-batch, so two sizes are counted, and between and beyond them a
line is drawn; the setting that is chosen in the end is counted as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from distft.config.recipe import Recipe
from distft.models.shapes import ModelShape
from distft.planner.memory import Memory, Peaks, put_together, zero_section
from distft.planner.setting import Setting
from distft.planner.sharding import Sizes

# Rows of the micro-batches between and beyond which the line is drawn. With one row there is no mask.
FEW, MORE = 2, 4


class Step(NamedTuple):
    """What a counted step depends on, besides recipe and model."""

    dtype_regime: str  # autocast | zero | fsdp
    checkpointing: bool
    accumulating: bool  # gradients of earlier micro-batches exist
    rows: int  # of the micro-batch


class Counts(Protocol):
    """What is counted on a recipe's model."""

    model: ModelShape
    sizes: Sizes

    @property
    def states(self) -> Mapping[str, int]:
        """Bytes, as put_together needs them."""

    def peaks(self, *steps: Step) -> list[Peaks]:
        """What each of these steps keeps at each of its moments; what was not counted yet is, side by side.

        Raises:
            SimulationError: it cannot be traced.
        """


class Counted:
    """Memory of a recipe's ranks from counts (planner.memory.Estimates). Its methods raise SimulationError as
    Counts.peaks does."""

    is_counted = True

    def __init__(self, recipe: Recipe, counts: Counts) -> None:
        self.recipe, self.counts, self.sizes = recipe, counts, counts.sizes

    def memory(self, setting: Setting, max_length: int | None = None) -> Memory:
        """Memory of a rank, from the line."""
        assert max_length in (None, self.recipe.data.max_length)
        # FSDP keeps what ZeRO keeps.
        regime = "autocast" if self._regime(setting) == "autocast" else "zero"
        few, more = self.counts.peaks(
            *(Step(regime, setting.gradient_checkpointing, False, rows) for rows in (FEW, MORE))
        )
        steps = (setting.micro_batch_size - FEW) / (MORE - FEW)
        earlier = self.counts.states["gradients"] if self._accumulates(setting) else 0
        peaks = {
            moment: Counter({kind: int(low[kind] + steps * (high[kind] - low[kind])) for kind in low | high})
            for moment, low in few.items()
            if (high := more.get(moment)) is not None
        }
        for live in peaks.values():
            live["gradients"] = max(live["gradients"], earlier)
        return self._together(peaks, setting)

    def exactly(self, setting: Setting) -> Memory:
        """Memory of a rank, counted as it is."""
        how = self._regime(setting), setting.gradient_checkpointing, self._accumulates(setting)
        return self._together(self.counts.peaks(Step(*how, setting.micro_batch_size))[0], setting)

    def _accumulates(self, setting: Setting) -> bool:
        """Whether gradients of earlier micro-batches exist."""
        return setting.accumulates(self.recipe) and setting.kind.replicates

    def _regime(self, setting: Setting) -> str:
        return setting.kind.regime(self.recipe.training.is_pure_bf16)

    def _together(self, peaks: Peaks, setting: Setting) -> Memory:
        zero = zero_section(self.recipe, setting, self.sizes)
        return put_together(self.recipe, self.sizes, self.counts.states, peaks, setting, zero)
