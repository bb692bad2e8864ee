"""Rows → token rows, once a node, cached by the content of all that goes in (data_files.cache_folder).

The result does not depend on the width: rows are tokenized, shuffled by seed and packed before anyone shards them.
The launcher runs this module before it starts anything, so that a bad row costs seconds and not an allocation.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.recipe import Recipe
from distft.data import rows
from distft.errors import DataError, DistftError
from distft.runs.directory import RunDir
from distft.train import worker
from distft.train.stopping import Stopping

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that the loss leaves out (torch.nn.CrossEntropyLoss)
Tokens = tuple[list[int], list[bool]]  # ids, and whether each is trained on


@dataclass
class Counts:
    """What became of the rows of one split."""

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    long_rows: int = 0
    longest: int = 0
    done: str = ""  # what was done with the long rows
    examples: list[str] = field(default_factory=list)  # the first long rows, with their place and length


@dataclass(frozen=True)
class Prepared:
    """Tokenized data: `train`, and `eval` where the recipe names some. Columns: input_ids, labels, seq_lengths."""

    train: Dataset
    eval: Dataset | None
    counts: dict[str, dict[str, Any]]


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a padding token.

    Raises:
        DataError: there is no tokenizer, or it has no padding token and the recipe names none.
    """
    from transformers import AutoTokenizer

    model = recipe.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"model.name_or_path: no tokenizer can be read from {model.name_or_path} ({reason})") from None
    if model.pad_token is not None:
        if tokenizer.convert_tokens_to_ids(model.pad_token) in (None, tokenizer.unk_token_id):
            raise DataError(f"model.pad_token: {model.pad_token!r} is not in the tokenizer's vocabulary")
        tokenizer.pad_token = model.pad_token
    if tokenizer.pad_token_id is None:
        mend = f"; set model.pad_token: {json.dumps(tokenizer.eos_token)}" if tokenizer.eos_token else ""
        raise DataError(f"model.pad_token: the tokenizer of {model.name_or_path} has no padding token{mend}")
    if recipe.data.chat_template:
        tokenizer.chat_template = Path(recipe.data.chat_template).read_text()
    return tokenizer


def load_prepared(recipe: Recipe) -> Prepared:
    """The prepared data from the cache; prepares it when it is not there.

    One process of a node prepares while the others wait for its file lock: no collective is open that could time out.
    """
    import datasets

    folder = rows.cache_folder(recipe)
    if not rows.is_prepared(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"DISTFT_CACHE: {folder.parent} cannot be written ({error.strerror})") from None
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not rows.is_prepared(folder):
                _prepare(recipe, folder)
    splits = {
        name: datasets.load_from_disk(str(folder / name)) for name in ("train", "eval") if (folder / name).is_dir()
    }
    return Prepared(splits["train"], splits.get("eval"), rows.read_counts(folder))


def _prepare(recipe: Recipe, folder: Path) -> None:
    """Write train/, eval/ and counts.json into `folder`, all or nothing."""
    tokenizer = load_tokenizer(recipe)
    _check_model_code(recipe)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
    try:
        counts = {"train": _prepare_split(recipe, tokenizer, recipe.data.train, work, "train")}
        if recipe.data.eval:
            counts["eval"] = _prepare_split(recipe, tokenizer, recipe.data.eval, work, "eval")
        (work / rows.COUNTS).write_text(json.dumps({name: asdict(count) for name, count in counts.items()}))
        shutil.rmtree(work / "tmp", ignore_errors=True)
        try:
            work.rename(folder)
        except OSError:  # another node was quicker on a shared file system: the same content by its name
            if not rows.is_prepared(folder):
                raise
    except OSError as error:
        raise DataError(f"DISTFT_CACHE: {folder.parent} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_model_code(recipe: Recipe) -> None:
    """Raises DataError where transformers cannot make the model: code of its own that is not trusted, unknown type."""
    from transformers import AutoConfig

    model = recipe.model
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        AutoConfig.from_pretrained(model.name_or_path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise DataError(
                f"model.trust_remote_code: got false, and {model.name_or_path} brings code of its own; "
                "set it to true if you trust where it comes from"
            ) from None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"model.name_or_path: {model.name_or_path} cannot be used ({reason})") from None


def _prepare_split(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, sources: str | list[str], work: Path, split: str
) -> Counts:
    from datasets import Dataset, Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter
    from trl import pack_dataset

    what, sources = "data.train" if split == "train" else "data.eval", rows.as_list(sources)
    data_format = recipe.data.format
    if data_format == "auto":
        data_format = rows.first_format(sources)
    encode = _ENCODERS[data_format](tokenizer, recipe)
    checked = rows.check_rows(rows.read_rows(sources), data_format, what)
    done = {"truncate": "cut off", "drop": "left out", "split": "split"}.get(recipe.data.long_rows, "")
    counts, temporary = Counts(done=done), work / "tmp" / split

    def documents() -> Iterator[dict[str, list[int]]]:
        for place, row in checked:
            for ids, trained in _fit(place, encode(place, row), recipe, data_format, counts):
                # The first token of a document has nothing before it to predict it from: in a packed row the model
                # would learn to guess it from the document before.
                labels = [i if t else IGNORE for i, t in zip(ids, trained, strict=True)]
                labels[0] = IGNORE
                counts.documents += 1
                counts.tokens += len(ids)
                counts.trained_tokens += sum(label != IGNORE for label in labels)
                yield {"input_ids": ids, "labels": labels}

    features = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))})
    temporary.mkdir(parents=True)
    with ArrowWriter(features=features, path=str(temporary / "documents.arrow")) as writer:
        for document in documents():
            writer.write(document)
        _check_lengths(recipe, data_format, what, counts)
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


def _fit(place: str, tokens: Tokens, recipe: Recipe, data_format: str, counts: Counts) -> Iterator[Tokens]:
    """A row as one document of at most max_length tokens, several (split), or none (drop)."""
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
                if len(ids) - start > 1:  # a single token predicts nothing
                    yield ids[start : start + limit], trained[start : start + limit]
            return
        ids, trained = ids[:limit], trained[:limit]
        if not any(trained[1:]):
            return
    if any(trained[1:]):
        yield ids, trained
    else:
        raise DataError(f"{place}: no token to train on")


def _check_lengths(recipe: Recipe, data_format: str, what: str, counts: Counts) -> None:
    """Raises DataError for long rows under `long_rows: error`, and where nothing is left."""
    if counts.long_rows and recipe.data.long_rows == "error":
        choices = "truncate, drop" + (" or split" if data_format == "text" else "")
        raise DataError(
            "\n".join(
                [
                    *counts.examples,
                    f"{what}: rows longer than data.max_length {recipe.data.max_length}: {counts.long_rows}, the "
                    f"longest of {counts.longest} tokens; raise it, or set data.long_rows: {choices}",
                ]
            )
        )
    if not counts.documents:
        raise DataError(f"{what}: no row is left: all are longer than data.max_length {recipe.data.max_length}")


Encoder = Callable[[str, dict[str, Any]], Tokens]


def _text_encoder(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Encoder:
    def encode(place: str, row: dict[str, Any]) -> Tokens:
        ids = _with_end(tokenizer(row["text"])["input_ids"], tokenizer)
        return ids, [True] * len(ids)

    return encode


def _prompt_completion_encoder(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Encoder:
    def encode(place: str, row: dict[str, Any]) -> Tokens:
        # Apart, as at inference: there the prompt is tokenized before any completion exists.
        prompt = _without_end(tokenizer(row["prompt"])["input_ids"], tokenizer)
        completion = _with_end(tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer)
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    return encode


def _messages_encoder(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Encoder:
    """Chat template, loss on the assistant's turns.

    A template with generation marks says what those are; for well-known ones trl has a marked twin; for the rest the
    turn is what the text gains from the generation prompt on, checked row by row.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not tokenizer.chat_template:
        raise DataError(
            f"data.format: messages need a chat template, and the tokenizer of {recipe.model.name_or_path} has none; "
            "set data.chat_template to a Jinja file, or use prompt + completion"
        )
    try:
        template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:  # not one that trl knows
        template = tokenizer.chat_template
    marked = has_generation_markers(template)

    def render(messages: list[dict[str, str]], **options: Any) -> Any:
        return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True, **options)

    def encode(place: str, row: dict[str, Any]) -> Tokens:
        messages = row["messages"]
        try:
            if marked:
                result = render(messages, return_assistant_tokens_mask=True)
                return result["input_ids"], [bool(flag) for flag in result["assistant_masks"]]
            ids = render(messages)["input_ids"]
            trained = [False] * len(ids)
            for index, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = render(messages[:index], add_generation_prompt=True)["input_ids"]
                    until = render(messages[: index + 1])["input_ids"]
                    if ids[: len(until)] != until or until[: len(before)] != before:
                        raise DataError(
                            f"{place}: the chat template changes earlier turns as later ones are added, so the "
                            "assistant's cannot be told; set data.chat_template to one with {% generation %} marks"
                        )
                    trained[len(before) : len(until)] = [True] * (len(until) - len(before))
            return ids, trained
        except DistftError:
            raise
        except Exception as error:  # the template's own: jinja2's errors and what its raise_exception gives
            raise DataError(f"{place}: messages: the chat template refuses this row ({error})") from None

    return encode


_ENCODERS = {"text": _text_encoder, "prompt_completion": _prompt_completion_encoder, "messages": _messages_encoder}


def _with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def main() -> int:
    """`python -m distft.train.data RECIPE [PROBLEM]`: prepare. What is wrong with the data goes to the file PROBLEM."""
    from distft.config.loading import DATA_FILES, load_recipe

    run = RunDir(Path(sys.argv[1]).parent)
    if run.stop.exists():  # a step of a job
        Stopping(run)
    try:
        recipe = load_recipe(sys.argv[1], needed=DATA_FILES)
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
