"""The warnings about a training that has hardly any optimizer steps, or fewer rows than one of them trains."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from distft.config.recipe import Recipe
from distft.data.conversations import strings_in
from distft.data.formats import Formatter
from distft.data.mixing import is_mix
from distft.data.reading import Tally, are_here, batches, examples
from distft.data.sources import as_sources, find_data
from distft.errors import DistftError
from distft.units import plural

FEW = 10
BYTES_PER_TOKEN = 4  # of UTF-8, where no tokenizer says it: English of today's tokenizers


def warnings(recipe: Recipe, counts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line where data (its `counts`, by split) make fewer than FEW optimizer steps, and one where they are fewer rows
    than the global batch has: what to change."""
    rows = counts["train"]["rows"]
    return _warning(recipe, rows, rows < counts["train"]["documents"])


def expected(recipe: Recipe, row_tokens: float | None = None) -> list[str]:
    """The same before the data is tokenized, of rows on this machine; no more are read than needed for both.

    Args:
        row_tokens: tokens of a row in the mean, where they are known.
    """
    try:
        rows = _rows(recipe, row_tokens)
    except DistftError:  # what is wrong with the data is said where it is checked
        rows = None
    if recipe.training.max_steps and (not rows or rows >= recipe.training.global_batch_size):
        return _warning(recipe)  # there may be more rows
    if not rows:
        return []
    return _warning(recipe, rows, recipe.data.packs, "about " * recipe.data.packs)


def _rows(recipe: Recipe, row_tokens: float | None) -> int | None:
    """Rows of the training data as they are packed: all, or as many as make FEW steps and a global batch. None where
    that is not known."""
    data, sources = recipe.data, as_sources(recipe.data.train)
    if not are_here(recipe) or is_mix(sources):
        return None
    found = find_data(data, lambda source: source in sources)["train"]
    trained = 1 - data.eval if isinstance(data.eval, float) else 1.0
    formatter, tally, rows, amount = Formatter.of(data), Tally(), 0, 0.0
    for _, batch, layout in batches(found, data):
        for _, example in examples(batch, layout, formatter, tally):
            if data.packs:
                tokens = row_tokens or sum(len(text.encode()) for text in strings_in(example.fields)) / BYTES_PER_TOKEN
                amount += min(1, tokens / data.max_length) if data.long_rows != "split" else tokens / data.max_length
            else:
                amount += 1
            rows = ceil(trained * amount)
            training = recipe.training
            if rows >= training.global_batch_size and (training.max_steps or training.optimizer_steps(rows) >= FEW):
                return rows
    return rows


def _warning(recipe: Recipe, rows: int | None = None, packed: bool = False, about: str = "") -> list[str]:
    training = recipe.training
    steps = training.optimizer_steps(rows or 0)
    known = [] if rows is None else [f"{about}{plural(rows, 'packed row' if packed else 'row')}"]
    unpack = ["data.packing: false"] if packed else []
    found = []
    if steps < FEW:
        why = [*known, f"global batch size {training.global_batch_size:,}"]
        why += [f"training.max_steps {training.max_steps}"] if training.max_steps else []
        more = ["a higher training.max_steps" if training.max_steps else "more training.num_train_epochs"]
        if not training.max_steps:  # which is independent of the rows
            more += ["a smaller training.global_batch_size", *unpack]
        found.append(
            f"this run makes only {'' if training.max_steps else about}{steps} optimizer step{'s' * (steps != 1)}: "
            f"{', '.join(why)}. It will learn little; what helps: {', '.join(more)}"
        )
    if rows is not None and rows < training.global_batch_size:
        more = ["more data", "a smaller training.global_batch_size", *unpack]
        found.append(
            f"each optimizer step trains rows of data.train more than once: the global batch has "
            f"{training.global_batch_size:,}, the data {known[0]}; what helps: {', '.join(more)}"
        )
    return found
