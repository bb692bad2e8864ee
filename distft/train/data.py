"""Prepared data: rows tokenized, shuffled and packed, once per node, cached under the digest of all that goes in.

It does not depend on the world size: rows are shuffled by the recipe's seed and packed before they are distributed.
The launcher runs this module before it starts anything, so that a bad row costs seconds and not an allocation.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from distft.config.recipe import Data, Recipe, Source
from distft.data import cache, reading
from distft.data.files import Found
from distft.data.formats import IGNORE
from distft.data.mixing import drawn, is_mix, taken
from distft.data.overlap import TrainedRows
from distft.data.reading import Tally, batches
from distft.data.sources import Use, find_data
from distft.errors import DataError, DistftError, first_line
from distft.runs.directory import RunDir
from distft.train import worker
from distft.train.chat import TokensDifferError
from distft.train.documents import Documents
from distft.train.encoding import Counts, RowEncoder, encode_all
from distft.train.progress import Progress
from distft.train.stopping import Stopping
from distft.train.tokens import load_tokenizer
from distft.units import plural

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

    from distft.train.documents import Numbers

CHUNK_BYTES = 2**24  # of the documents that are packed at once
PACKED = 1000  # trl packs so many documents together


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
        name: datasets.Dataset.from_file(str(folder / f"{name}.arrow"))
        for name in ("train", "eval")
        if (folder / f"{name}.arrow").is_file()
    }
    return Prepared(splits["train"], splits.get("eval"), cache.read_counts(folder, recipe))


def _not_writable(folder: Path, error: OSError) -> str:
    return f"cache: {folder.parent} is not writable ({error.strerror or error}); set DISTFT_CACHE to another folder"


def _prepare(recipe: Recipe, folder: Path) -> None:
    """Write train.arrow, eval.arrow and counts.json into `folder`, all or nothing."""
    rows = RowEncoder(recipe, load_tokenizer(recipe))
    _check_model_code(recipe)
    found = find_data(recipe.data)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
    try:
        try:
            counts = _prepare_splits(rows, found, work)
        except TokensDifferError as error:
            rows.tokenization.slow_down(str(error))
            counts = _prepare_splits(rows, found, work)
        cache.write_counts(work, {name: asdict(count) for name, count in counts.items()}, recipe)
        try:
            work.rename(folder)
        except OSError:  # another node was faster on a shared file system; the name says that the content is the same
            if not cache.is_prepared(folder):
                raise
    except OSError as error:
        raise DataError(_not_writable(folder, error)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _prepare_splits(rows: RowEncoder, found: Mapping[Use, Sequence[Found]], folder: Path) -> dict[Use, Counts]:
    counts: dict[Use, Counts] = {}
    trained = TrainedRows()
    try:
        for use, several in found.items():
            rows.trained = trained if use == "eval" else None
            if several:
                counts |= _prepare_split(rows, several, use, folder, trained)
    finally:
        shutil.rmtree(folder / "tmp", ignore_errors=True)
    return counts


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


def _prepare_split(
    rows: RowEncoder, found: Sequence[Found], use: Use, folder: Path, trained: TrainedRows
) -> dict[Use, Counts]:
    """Write the documents of a split, and what is held out of them for the other. `trained` gets the rows of data.train
    where those of data.eval are compared with them.

    Raises:
        DataError: a file that cannot be read, or rows that would not be trained as they are meant.
    """
    recipe, what, tally = rows.recipe, f"data.{use}", Tally()
    splits: list[Use] = ["train", "eval"] if rows.held_out else [use]
    counts = {split: Counts.of(recipe) for split in splits}
    read = [0] * len(found)
    with ExitStack() as stack:
        documents = {split: stack.enter_context(Documents(folder / "tmp" / split)) for split in splits}
        with Progress(what) as progress:
            for number, parts, later, keys in encode_all(batches(found, recipe.data), rows):
                for split in splits:
                    # Without a fraction that is held out, all that is read is of the split that is asked for.
                    encoded, counted = parts[split if rows.held_out else "train"]
                    counts[split].merge(counted)
                    documents[split].add(encoded, number, read[number])
                read[number] += later.rows
                tally.merge(later)
                trained.update(keys)
                progress.show(tally.rows)
        tally.check(what, found)
        counts[use].layouts, counts[use].untrained = dict(tally.layouts), tally.left_out()
        counts[use].odd = tally.odd.summary()
        counts[use].empty = tally.empty(found)
        counts[use].notes += tally.notes(what, recipe.data)
        if use == "train":
            counts[use].notes += counts[use].unseen(recipe)
        for split in splits:
            check_lengths(recipe, f"data.{split}", counts[split])
            check_left(recipe, f"data.{split}", counts[split], tally.rows)
            documents[split].finish()
            which = numpy.arange(len(documents[split].lengths))
            # What is held out is held out of each source alike, whatever its share of the training.
            if split == use and is_mix([one.source for one in found]):
                which = _mixed(
                    what, documents[split], [one.source for one in found], recipe.training.seed, counts[split]
                )
            if split == "train":
                which = numpy.random.default_rng(recipe.training.seed).permutation(which)
            _write(documents[split], which, recipe.data, counts[split], folder / f"{split}.arrow")
    return counts


def _mixed(what: str, documents: Documents, sources: Sequence[Source], seed: int, counts: Counts) -> Numbers:
    """The documents of the rows that each source gives to the mix.

    Raises:
        DataError: none gives any.
    """
    edges = []  # the first document of each row of a source, and the end of its last one
    for number in range(len(sources)):
        own = numpy.flatnonzero(documents.sources == number)
        begins = own[numpy.diff(documents.rows[own], prepend=-1) != 0]
        edges.append(numpy.append(begins, own[-1:] + 1))
    have = [max(0, len(one) - 1) for one in edges]
    counts.mix = taken(sources, have)
    wanted = [number for _, _, number in counts.mix]
    if not any(wanted):
        shares = ", ".join(f"{number:,} of {rows:,} of {path}" for path, rows, number in counts.mix)
        raise DataError(f"{what}: the mix takes no row ({shares}); change the weights, rows or epochs")
    chosen = [
        numpy.arange(starts[row], starts[row + 1])
        for number, starts in enumerate(edges)
        for row in drawn(have[number], wanted[number], seed + number)
    ]
    return numpy.concatenate(chosen) if chosen else numpy.empty(0, numpy.int64)


def _write(documents: Documents, which: Numbers, data: Data, counts: Counts, path: Path) -> None:
    """Pack these documents, a chunk at a time, and count them."""
    import pyarrow
    from datasets import Dataset
    from trl import pack_dataset

    step = PACKED * max(1, CHUNK_BYTES // (8 * PACKED * data.max_length))
    counts.documents, counts.rows, counts.tokens, counts.trained_tokens = len(which), 0, 0, 0
    with ExitStack() as stack:
        writer = None
        for start in range(0, len(which), step):
            table = documents.table(which[start : start + step])
            labels = table["labels"].combine_chunks().flatten().to_numpy()
            counts.tokens += len(labels)
            counts.trained_tokens += int((labels != IGNORE).sum())
            if data.packs:
                dataset = pack_dataset(Dataset(table, fingerprint=str(start)), data.max_length, "bfd")
                table = dataset.with_format("arrow")[:]
            else:
                table = _with_lengths(table)
            counts.rows += len(table)
            table = table.replace_schema_metadata(None)
            writer = writer or stack.enter_context(pyarrow.ipc.new_stream(str(path), table.schema))
            writer.write_table(table)


def _with_lengths(table: pyarrow.Table) -> pyarrow.Table:
    """With seq_lengths: each row is one document."""
    import pyarrow
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(table["input_ids"]).combine_chunks().cast(pyarrow.int64())
    starts = pyarrow.array(range(len(table) + 1), pyarrow.int32())
    return table.append_column("seq_lengths", pyarrow.ListArray.from_arrays(starts, lengths))


def check_lengths(recipe: Recipe, what: str, counts: Counts) -> None:
    """Raises DataError where there are rows that are too long, and data.long_rows is `error`."""
    limit = recipe.data.max_length
    if counts.long_rows and recipe.data.long_rows == "error":
        choices = "truncate, drop or split" if counts.can_split else "truncate or drop"
        number = plural(counts.long_rows, "row") + (" is" if counts.long_rows == 1 else " are")
        total = (
            f"{what}: {number} longer than data.max_length ({limit:,} tokens), the longest has {counts.longest:,}; "
            f"raise data.max_length, or set data.long_rows: {choices}"
        )
        raise DataError(
            "\n".join([*(f"{place}: {plural(tokens, 'token')}" for place, tokens in counts.examples), total])
        )


def check_left(recipe: Recipe, what: str, counts: Counts, rows: int) -> None:
    """Raises DataError where no row of a split is left to train on, once all `rows` are read."""
    limit = recipe.data.max_length
    if not counts.documents and counts.long_rows and recipe.data.long_rows == "truncate":
        raise DataError(
            f"{what}: no row is left: what is trained lies beyond data.max_length ({limit:,} tokens) in each"
        )
    if not counts.documents and counts.long_rows:
        raise DataError(f"{what}: no row is left: all are longer than data.max_length ({limit:,} tokens)")
    if not counts.documents and isinstance(recipe.data.eval, float):
        if rows == 1:
            raise DataError("data.eval: data.train has one row, and a fraction needs several; name evaluation data")
        change = "raise" if what == "data.eval" else "lower"
        raise DataError(
            f"data.eval: a fraction of {recipe.data.eval} leaves none of the {rows:,} rows of data.train for {what}; "
            f"{change} it, or name evaluation data"
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
