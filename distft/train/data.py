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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.recipe import Recipe
from distft.data import reading, rows
from distft.errors import DataError, DistftError, RecipeError, first_line
from distft.runs.directory import RunDir
from distft.train import worker
from distft.train.chat import RowProblem
from distft.train.problems import Problems
from distft.train.stopping import Stopping
from distft.train.tokens import Tokens, encoder, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that the loss leaves out (torch.nn.CrossEntropyLoss)


@dataclass
class Counts:
    """What became of the rows of one split."""

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    long_rows: int = 0
    longest: int = 0
    done: str = ""  # what was done to the long rows
    examples: list[str] = field(default_factory=list)  # the first long rows, with their place and length
    cut_answers: int = 0  # long rows that are not trained at all: what is left of them has no token to train on
    cut_examples: list[str] = field(default_factory=list)
    thoughtless: int = 0  # the assistant's turns that are not trained: the chat template removes their thought
    notes: list[str] = field(default_factory=list)  # what is worth knowing of the tokenizer and its chat template

    @classmethod
    def of(cls, recipe: Recipe, notes: list[str]) -> Counts:
        """Those of no row yet."""
        done = {"truncate": "cut off", "drop": "left out", "split": "split"}.get(recipe.data.long_rows, "")
        return cls(done=done, notes=list(notes))

    def add(self, labels: list[int]) -> None:
        """Count a document."""
        self.documents += 1
        self.tokens += len(labels)
        self.trained_tokens += sum(label != IGNORE for label in labels)


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

    folder = rows.cache_folder(recipe)
    if not rows.is_prepared(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(_not_writable(folder, error)) from None
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not rows.is_prepared(folder):
                _prepare(recipe, folder)
    splits = {
        name: datasets.load_from_disk(str(folder / name)) for name in ("train", "eval") if (folder / name).is_dir()
    }
    return Prepared(splits["train"], splits.get("eval"), rows.read_counts(folder))


def _not_writable(folder: Path, error: OSError) -> str:
    return f"cache: {folder.parent} is not writable ({error.strerror or error}); set DISTFT_CACHE to another folder"


def check_supported(recipe: Recipe) -> None:
    """Raises RecipeError for what a recipe can say and the preparation does not do yet."""
    data = recipe.data
    problems = [
        f"data.{name}: {value!r} is not supported yet"
        for name, value in (("columns", data.columns), ("roles", data.roles))
        if value
    ]
    if data.format in ("alpaca", "alpaca_prompt", "alpaca_chat", "sharegpt", "tokens"):
        problems.append(f"data.format: {data.format} is not supported yet")
    if isinstance(data.eval, float):
        problems.append("data.eval: a fraction is not supported yet")
    for name, sources in (("train", data.train), ("eval", data.eval)):
        if isinstance(sources, list) and not all(isinstance(source, str) for source in sources):
            problems.append(f"data.{name}: sources with a share are not supported yet")
    if problems:
        raise RecipeError(problems)


def _prepare(recipe: Recipe, folder: Path) -> None:
    """Write train/, eval/ and counts.json into `folder`, all or nothing."""
    check_supported(recipe)
    tokenizer = load_tokenizer(recipe)
    _check_model_code(recipe)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
    try:
        counts = {"train": _prepare_split(recipe, tokenizer, rows.to_read(recipe, "train"), work, "train")}
        if recipe.data.eval:
            counts["eval"] = _prepare_split(recipe, tokenizer, rows.to_read(recipe, "eval"), work, "eval")
        (work / rows.COUNTS).write_text(json.dumps({name: asdict(count) for name, count in counts.items()}))
        shutil.rmtree(work / "tmp", ignore_errors=True)
        try:
            work.rename(folder)
        except OSError:  # another node was faster on a shared file system; the name says that the content is the same
            if not rows.is_prepared(folder):
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


def _prepare_split(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, sources: list[str], work: Path, split: str
) -> Counts:
    from datasets import Dataset, Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter
    from trl import pack_dataset

    what = f"data.{split}"
    data_format = rows.first_format(sources) if recipe.data.format == "auto" else recipe.data.format
    if data_format != "text" and recipe.data.long_rows == "split":
        raise DataError(
            f"data.long_rows: split needs format text, and {what} has {data_format}; use error, truncate or drop"
        )
    encoding = encoder(data_format, tokenizer, recipe)
    checked = rows.check_rows(rows.read_rows(sources), data_format, what)
    counts, problems, temporary = Counts.of(recipe, encoding.notes), Problems(), work / "tmp" / split

    def documents() -> Iterator[dict[str, list[int]]]:
        read = 0
        for place, row in checked:
            read += 1
            try:
                for document in encoding.encode(row):
                    counts.thoughtless += len(document.left_out)
                    for ids, trained in fit(place, (document.ids, document.trained), recipe, counts):
                        labels = labels_of(ids, trained)
                        counts.add(labels)
                        yield {"input_ids": ids, "labels": labels}
            except RowProblem as problem:
                problems.add(problem.kind, place, problem.text)
        if problems.counts:
            raise DataError("\n".join(problems.lines(what, read)))

    features = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))})
    temporary.mkdir(parents=True)
    with ArrowWriter(features=features, path=str(temporary / "documents.arrow")) as writer:
        for document in documents():
            writer.write(document)
        check_lengths(recipe, data_format, what, counts)
        writer.finalize()
    dataset = Dataset.from_file(str(temporary / "documents.arrow"))
    if split == "train":
        dataset = dataset.shuffle(seed=recipe.training.seed).flatten_indices()
    if recipe.data.packing:
        dataset = pack_dataset(dataset, recipe.data.max_length, "bfd")
    else:
        dataset = dataset.map(lambda row: {"seq_lengths": [len(row["input_ids"])]})
    counts.rows = len(dataset)
    dataset.save_to_disk(str(work / split))
    return counts


def labels_of(ids: list[int], trained: list[bool]) -> list[int]:
    """The labels of a document: its trained tokens, IGNORE elsewhere.

    Its first token cannot be predicted: nothing comes before it. In a packed row, the model would learn to guess it
    from the document before.
    """
    labels = [i if t else IGNORE for i, t in zip(ids, trained, strict=True)]
    labels[:1] = [IGNORE][: len(labels)]
    return labels


def fit(place: str, tokens: Tokens, recipe: Recipe, counts: Counts) -> Iterator[Tokens]:
    """A row as one document of at most max_length tokens, as several (`split`), or as none (`drop`).

    Raises:
        RowProblem: the row fits, and none of its tokens is trained on.
    """
    ids, trained = tokens
    limit, how = recipe.data.max_length, recipe.data.long_rows
    if len(ids) > limit:
        counts.long_rows += 1
        counts.longest = max(counts.longest, len(ids))
        if len(counts.examples) < rows.SHOWN_PROBLEMS:
            counts.examples.append(f"{place}: {len(ids)} tokens")
        if how in ("drop", "error"):
            return
        if how == "split":
            for start in range(0, len(ids), limit):
                if len(ids) - start > 1:  # from a single token nothing is predicted
                    yield ids[start : start + limit], trained[start : start + limit]
            return
        ids, trained = ids[:limit], trained[:limit]
        if not any(trained[1:]):
            counts.cut_answers += 1
            if len(counts.cut_examples) < rows.SHOWN_PROBLEMS:
                counts.cut_examples.append(place)
            return
    if any(trained[1:]):
        yield ids, trained
    else:
        raise RowProblem("no-trained-token", "no token to train on")


def check_lengths(recipe: Recipe, data_format: str, what: str, counts: Counts) -> None:
    """Check what became of long rows, at the end of a split.

    Raises:
        DataError: there are some, and long_rows is `error`; or no row is left.
    """
    limit = recipe.data.max_length
    if counts.long_rows and recipe.data.long_rows == "error":
        choices = "truncate, drop" + (" or split" if data_format == "text" else "")
        number = f"{counts.long_rows} rows are" if counts.long_rows > 1 else "1 row is"
        total = (
            f"{what}: {number} longer than data.max_length ({limit} tokens), the longest has {counts.longest}; raise "
            f"data.max_length, or set data.long_rows: {choices}"
        )
        raise DataError("\n".join([*counts.examples, total]))
    if not counts.documents:
        raise DataError(f"{what}: no row is left: all are longer than data.max_length ({limit} tokens)")


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
        if not rows.is_prepared(rows.cache_folder(recipe)):
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
