"""Rows to tokens: a recipe's tokenizer, and which tokens of a row are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.recipe import Recipe
from distft.errors import DataError, DistftError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[list[int], list[bool]]  # ids, and whether each is trained on
Encoder = Callable[[str, Mapping[str, Any]], Tokens]  # takes a row's place and its fields


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
        raise DataError(
            f"model.name_or_path: no tokenizer can be read from {model.name_or_path} ({first_line(error)})"
        ) from None
    if model.pad_token is not None:
        if tokenizer.convert_tokens_to_ids(model.pad_token) in (None, tokenizer.unk_token_id):
            raise DataError(f"model.pad_token: {model.pad_token!r} is not in the tokenizer's vocabulary")
        tokenizer.pad_token = model.pad_token
    if tokenizer.pad_token_id is None:
        fix = f"; set model.pad_token: {json.dumps(tokenizer.eos_token)}" if tokenizer.eos_token else ""
        raise DataError(f"model.pad_token: the tokenizer of {model.name_or_path} has no padding token{fix}")
    if recipe.data.chat_template:
        tokenizer.chat_template = Path(recipe.data.chat_template).read_text()
    return tokenizer


def encoder(data_format: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Encoder:
    """The function that makes tokens of a row in this format (not `auto`).

    Raises:
        DataError: the tokenizer cannot encode this format. The function raises it for a row that cannot be encoded.
    """
    return _ENCODERS[data_format](tokenizer, recipe)


def _text_encoder(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Encoder:
    def encode(place: str, row: Mapping[str, Any]) -> Tokens:
        ids = _with_end(_ids(tokenizer, row["text"]), tokenizer)
        return ids, [True] * len(ids)

    return encode


def _prompt_completion_encoder(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Encoder:
    def encode(place: str, row: Mapping[str, Any]) -> Tokens:
        # Separately, as at inference: there the prompt is tokenized before any completion exists.
        prompt = _without_end(_ids(tokenizer, row["prompt"]), tokenizer)
        completion = _with_end(_ids(tokenizer, row["completion"], add_special_tokens=False), tokenizer)
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    return encode


def _messages_encoder(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Encoder:
    """Chat template, loss on the assistant's turns.

    A template with generation marks says itself which tokens those are; for templates that trl knows, it has a copy
    with marks. With any other template, a turn starts where the conversation before it ends.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not tokenizer.chat_template:
        raise DataError(
            f"data.format: messages need a chat template, and the tokenizer of {recipe.model.name_or_path} has none; "
            "set data.chat_template to a Jinja file, or use prompt + completion"
        )
    try:
        template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:  # a template that trl does not know
        template = tokenizer.chat_template
    marked = has_generation_markers(template)

    def render(messages: list[dict[str, str]], **options: Any) -> Any:
        return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True, **options)

    def encode(place: str, row: Mapping[str, Any]) -> Tokens:
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
                            f"{place}: the chat template changes earlier turns when later ones are added, so the "
                            "assistant's tokens cannot be located; set data.chat_template to one with "
                            "{% generation %} marks"
                        )
                    trained[len(before) : len(until)] = [True] * (len(until) - len(before))
            return ids, trained
        except DistftError:
            raise
        except Exception as error:  # the template's: jinja2's errors, and those of its raise_exception
            raise DataError(f"{place}: messages: the chat template rejects this row ({error})") from None

    return encode


_ENCODERS = {"text": _text_encoder, "prompt_completion": _prompt_completion_encoder, "messages": _messages_encoder}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    found: Any = tokenizer(text, **options)["input_ids"]  # of one text, a list of numbers
    return found


def _with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
