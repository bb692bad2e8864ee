"""Prepared data: rows tokenized, shuffled and packed, once per node, cached under the digest of all that goes in.

It does not depend on the world size: rows are shuffled by the recipe's seed and packed before they are distributed.
The launcher runs this module before it starts anything, so that a bad row costs seconds and not an allocation.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.recipe import Recipe, Source
from distft.data import cache, reading
from distft.data.files import Found
from distft.data.formats import IGNORE
from distft.data.mixing import drawn, is_mix, mixed_counts
from distft.data.reading import Tally, batches
from distft.data.sources import Use, find_data
from distft.errors import DataError, DistftError, first_line
from distft.runs.directory import RunDir
from distft.train import worker
from distft.train.encoding import Counts, RowEncoder, encode_all
from distft.train.progress import Progress
from distft.train.stopping import Stopping
from distft.train.tokens import load_tokenizer

if TYPE_CHECKING:
    import numpy
    import pyarrow
    from datasets import Dataset


@dataclass(frozen=True)
class Prepared:
    """Tokenized data: `train`, and `eval` if the recipe names some. Columns: input_ids, labels, seq_lengths."""

    train: Dataset
    eval: Dataset | None
    counts: dict[str, dict[str, Any]]


def load_prepared(recipe: Recipe) -> Prepared:
    """The prepared data from the cache; it is prepared if it is not there.

    One process of a node prepares it while the others wait for its file lock: no collective is open that could time
    out.
    """
    import datasets

    folder = cache.cache_folder(recipe)
    if not cache.is_prepared(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(_not_writable(folder, error)) from None
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not cache.is_prepared(folder):
                _prepare(recipe, folder)
    splits = {
        name: datasets.load_from_disk(str(folder / name)) for name in ("train", "eval") if (folder / name).is_dir()
    }
    return Prepared(splits["train"], splits.get("eval"), cache.read_counts(folder))


def _not_writable(folder: Path, error: OSError) -> str:
    return f"cache: {folder.parent} is not writable ({error.strerror or error}); set DISTFT_CACHE to another folder"


def _prepare(recipe: Recipe, folder: Path) -> None:
    """Write train/, eval/ and counts.json into `folder`, all or nothing."""
    rows = RowEncoder(recipe, load_tokenizer(recipe))
    _check_model_code(recipe)
    found = find_data(recipe.data)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
    try:
        counts: dict[Use, Counts] = {}
        for use, sources in found.items():
            if sources:
                for split, documents in _encoded(rows, sources, use, work / "tmp").items():
                    counts[split] = _write(recipe, documents, split, work / split)
        (work / cache.COUNTS).write_text(json.dumps({name: asdict(count) for name, count in counts.items()}))
        shutil.rmtree(work / "tmp", ignore_errors=True)
        try:
            work.rename(folder)
        except OSError:  # another node was faster on a shared file system; the name says that the content is the same
            if not cache.is_prepared(folder):
                raise
    except OSError as error:
        raise DataError(_not_writable(folder, error)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_model_code(recipe: Recipe) -> None:
    """Check that transformers can make the model.

    Raises:
        DataError: its type is unknown, or it brings its own code, which the recipe does not trust.
    """
    from transformers import AutoConfig

    model = recipe.model
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        AutoConfig.from_pretrained(model.name_or_path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise DataError(
                f"model.trust_remote_code: got false, and {model.name_or_path} comes with its own code; "
                "set it to true if you trust the source"
            ) from None
        raise DataError(f"model.name_or_path: {model.name_or_path} cannot be loaded ({first_line(error)})") from None


@dataclass
class _Documents:
    """The documents of one source that belong to one split, in a file. `rows`: the number of each one's row."""

    path: Path
    source: Source
    counts: Counts
    rows: list[numpy.ndarray] = field(default_factory=list)


def _encoded(rows: RowEncoder, found: Sequence[Found], use: Use, folder: Path) -> dict[Use, list[_Documents]]:
    """The documents of the sources of a split, and of what is held out of them for the other.

    Raises:
        DataError: a file that cannot be read, or rows that would not be trained as they are meant.
    """
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    recipe, what, tally = rows.recipe, f"data.{use}", Tally()
    features = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))})
    splits: list[Use] = ["train", "eval"] if rows.held_out else [use]
    folder.mkdir(exist_ok=True)
    result: dict[Use, list[_Documents]] = {
        split: [
            # What is held out is held out of each source alike, whatever its share of the training.
            _Documents(
                folder / f"{split}-{number}.arrow",
                one.source if split == use else Source(path=one.source.path),
                Counts.of(recipe),
            )
            for number, one in enumerate(found)
        ]
        for split in splits
    }
    read = [0] * len(found)
    with ExitStack() as stack:
        writers = {
            one.path: stack.enter_context(ArrowWriter(features=features, path=str(one.path)))
            for several in result.values()
            for one in several
        }
        progress = stack.enter_context(Progress(what))
        for number, parts, later in encode_all(batches(found, recipe.data), rows):
            for split, several in result.items():
                # Without a fraction that is held out, all that is read is the split that is asked for.
                part, into = parts[split if rows.held_out else "train"], several[number]
                into.counts.merge(part.counts)
                into.rows.append(part.rows + read[number])
                writers[into.path].write_table(part.documents)
            read[number] += later.rows
            tally.merge(later)
            progress.show(tally.rows)
        for writer in writers.values():
            writer.finalize()
    tally.check(what)
    result[use][0].counts.layouts, result[use][0].counts.untrained = dict(tally.layouts), tally.left_out()
    return result


def _write(recipe: Recipe, sources: list[_Documents], split: Use, folder: Path) -> Counts:
    """Mix, shuffle and pack the documents of a split.

    Raises:
        DataError: rows are too long, or none is left.
    """
    from datasets import Dataset, concatenate_datasets
    from trl import pack_dataset

    counts = Counts.of(recipe)
    for source in sources:
        counts.merge(source.counts)
        counts.layouts |= source.counts.layouts
        counts.untrained |= source.counts.untrained
    check_lengths(recipe, f"data.{split}", counts)
    parts = [Dataset.from_file(str(source.path)) for source in sources]
    if is_mix([source.source for source in sources]):
        parts = _mixed(parts, sources, recipe.training.seed, counts)
    dataset = concatenate_datasets(parts)
    if split == "train":
        dataset = dataset.shuffle(seed=recipe.training.seed).flatten_indices()
    if recipe.data.packing:
        dataset = pack_dataset(dataset, recipe.data.max_length, "bfd")
    else:
        dataset = dataset.with_format("arrow").map(_with_lengths, batched=True).with_format(None)
    counts.rows = len(dataset)
    dataset.save_to_disk(str(folder))
    return counts


def _mixed(parts: list[Dataset], sources: list[_Documents], seed: int, counts: Counts) -> list[Dataset]:
    """The documents of the rows that each source gives to the mix. `counts` become theirs."""
    import numpy

    edges = []  # where the documents of each row begin
    for source in sources:
        numbers = numpy.concatenate(source.rows) if source.rows else numpy.empty(0, numpy.int64)
        edges.append(numpy.flatnonzero(numpy.diff(numbers, prepend=-1, append=-1)))
    have = [max(0, len(one) - 1) for one in edges]
    wanted = mixed_counts(have, [source.source for source in sources])
    mixed = []
    for number, (part, starts) in enumerate(zip(parts, edges, strict=True)):
        rows = numpy.array(drawn(have[number], wanted[number], seed + number), numpy.int64)
        taken = [numpy.arange(starts[row], starts[row + 1]) for row in rows]
        mixed.append(part.select(numpy.concatenate(taken) if taken else []))
        counts.mix.append((sources[number].source.path, have[number], wanted[number]))
    counts.documents = sum(map(len, mixed))
    counts.tokens = counts.trained_tokens = 0
    for table in (table for part in mixed for table in part.with_format("arrow").iter(1000)):
        labels = table["labels"].combine_chunks().flatten().to_numpy()
        counts.tokens += len(labels)
        counts.trained_tokens += int((labels != IGNORE).sum())
    return mixed


def _with_lengths(table: pyarrow.Table) -> pyarrow.Table:
    """With seq_lengths: each row is one document."""
    import pyarrow
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(table["input_ids"]).combine_chunks().cast(pyarrow.int64())
    starts = pyarrow.array(range(len(table) + 1), pyarrow.int32())
    return table.append_column("seq_lengths", pyarrow.ListArray.from_arrays(starts, lengths))


def check_lengths(recipe: Recipe, what: str, counts: Counts) -> None:
    """Check what became of long rows, at the end of a split.

    Raises:
        DataError: there are some, and long_rows is `error`; or no row is left.
    """
    limit = recipe.data.max_length
    if counts.long_rows and recipe.data.long_rows == "error":
        only_text = all(layout.startswith("text ") for layout in counts.layouts)
        choices = "truncate, drop or split" if only_text else "truncate or drop"
        number = f"{counts.long_rows} rows are" if counts.long_rows > 1 else "1 row is"
        total = (
            f"{what}: {number} longer than data.max_length ({limit} tokens), the longest has {counts.longest}; raise "
            f"data.max_length, or set data.long_rows: {choices}"
        )
        raise DataError("\n".join([*counts.examples, total]))
    if not counts.documents and counts.long_rows:
        raise DataError(f"{what}: no row is left: all are longer than data.max_length ({limit} tokens)")
    if not counts.documents and isinstance(recipe.data.eval, float):
        raise DataError(
            f"data.eval: a fraction of {recipe.data.eval} leaves no row for data.{what.removeprefix('data.')}; "
            "change it, or name evaluation data"
        )
    if not counts.documents:
        raise DataError(f"{what}: no row is left: all are marked not to be trained")


def _replace(path: Path, text: str) -> None:
    """Write a file at once: another node may read it."""
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_text(text)
    whole.replace(path)


def main() -> int:
    """`python -m distft.train.data RECIPE [PROBLEM]`: prepare the data of RECIPE.

    What is wrong with it goes into the file PROBLEM, else to standard error.
    """
    from distft.config.loading import DATA_FILES, dump_recipe, load_recipe

    run = RunDir(Path(sys.argv[1]).parent)
    if run.stop.exists():  # RECIPE is in a run directory: a step of a job, which may be asked to stop
        Stopping(run)
    try:
        recipe = load_recipe(sys.argv[1], needed=DATA_FILES)
        if (fixed := reading.pinned(recipe)) != recipe:  # the ranks must find the very data that is prepared here
            recipe = fixed
            _replace(Path(sys.argv[1]), dump_recipe(recipe))
        if not cache.is_prepared(cache.cache_folder(recipe)):
            with worker.importing():
                from transformers import AutoConfig, AutoTokenizer  # noqa: F401
                from trl import pack_dataset  # noqa: F401
            load_prepared(recipe)
    except DistftError as error:
        if len(sys.argv) > 2:
            Path(sys.argv[2]).write_text(str(error))
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:  # Stopping
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
