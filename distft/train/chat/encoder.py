"""The encoder of conversations, and what can be said of a template before any row."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from distft.data.problems import RowProblem
from distft.models.vocabulary import control_tokens
from distft.train.chat.checks import ignored_option
from distft.train.chat.conversation import Conversation, Turns
from distft.train.chat.habits import SAMPLE, Habits
from distft.train.chat.messages import Message
from distft.train.chat.ranges import Range
from distft.train.chat.template import ChatTemplate, Rendered
from distft.train.chat.tokenize import Tokenization
from distft.train.chat.values import FLAGS, check_message, is_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["last", "all", "all_with_reasoning"]
# Variables of templates that rows give beside messages; any other stands in chat_template_kwargs.
_OPTIONS = ("enable_thinking", "preserve_thinking", "reasoning_effort")


@dataclass(frozen=True)
class Span:
    """A piece of a document's text: `role` is "" for the template's own text; positions are characters."""

    role: str
    start: int
    end: int
    trained: bool


@dataclass(frozen=True)
class Document:
    """What one row, or with all_with_reasoning one turn of it, becomes. `left_out` are the assistant messages that are
    not trained because the template removes their thought."""

    ids: list[int]
    trained: list[bool]
    text: str
    spans: list[Span]
    left_out: tuple[int, ...] = ()


class ChatEncoder:
    """Encodes conversations for one tokenizer.

    Args:
        tokenizer: with its chat template.
        train_on: the assistant's turns that are trained. all; last: those after the last user message;
            all_with_reasoning: all, and a turn whose thought the template removes once the conversation goes on is
            trained in a document that ends with it.
        ignore_fields: keys of rows and messages that are left out before rendering.
        options: variables for the template; a row's own take precedence.
        tokenization: of that tokenizer, if it is shared.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_on: TrainOn = "all",
        ignore_fields: Iterable[str] = (),
        options: Mapping[str, Any] | None = None,
        tokenization: Tokenization | None = None,
    ):
        self.tokenizer = tokenizer
        self.tokenization = tokenization or Tokenization(tokenizer)
        self.train_on = train_on
        self.ignored = frozenset(ignore_fields)
        self.options = dict(options or {})
        self._known: dict[tuple[str, str], Habits] = {}

    def encode(self, row: Mapping[str, Any]) -> list[Document]:
        """A row with `messages`, and where it has them tools, documents and chat_template_kwargs.

        Raises:
            RowProblem: the row would not be trained as it is meant.
        """
        conversation, wanted = self._conversation(row)
        turns = conversation.turns(len(conversation.messages), wanted)
        answer = max(n for n, message in enumerate(conversation.messages) if message["role"] == "assistant")
        if answer in turns.thoughtless:
            raise conversation.thought_problem(answer, turns.thoughtless[answer])
        if self.train_on != "all_with_reasoning":
            return [self._document(conversation, turns)]
        earlier = list(_with_thoughts(conversation, turns))
        parts = [*reversed(earlier), turns] if turns.ranges else list(reversed(earlier))
        return [self._document(conversation, part) for part in parts]

    def habits(self, options: Mapping[str, Any] | None = None, tools: list[Any] | None = None) -> Habits:
        """What is known of the template with these variables. (Rows with tools may have a template to themselves.)"""
        source = str(self.tokenizer.get_chat_template(None, tools))
        options = {**self.options, **(options or {})}
        key = (source, json.dumps(options, sort_keys=True, default=str))
        if key not in self._known:
            if len(self._known) >= 64:  # each row has values of its own
                self._known.clear()
            self._known[key] = Habits(ChatTemplate(self.tokenizer, source, options))
        return self._known[key]

    def _conversation(self, row: Mapping[str, Any]) -> tuple[Conversation, frozenset[int]]:
        """The row without what is not rendered, and the assistant messages that are to be trained."""
        row = {key: value for key, value in row.items() if key not in self.ignored and value is not None}
        messages: list[Message] = [
            {key: value for key, value in message.items() if key not in self.ignored} for message in row["messages"]
        ]
        for index in range(len(messages)):
            check_message(messages, index)
        wanted = [n for n in range(len(messages)) if is_trained(messages, n) and messages[n]["role"] == "assistant"]
        if self.train_on == "last":
            last_user = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
            wanted = [n for n in wanted if n > last_user]
        if not wanted:
            raise RowProblem("no-trained-token", "messages: no assistant message is to be trained")
        messages = [{key: value for key, value in message.items() if key not in FLAGS} for message in messages]
        options = {key: row[key] for key in _OPTIONS if key in row} | dict(row.get("chat_template_kwargs") or {})
        fields = {key: row[key] for key in ("tools", "documents") if row.get(key)}
        habits = self.habits(options, fields.get("tools"))
        for option in options:
            if option not in habits.variables:
                raise ignored_option(option)
        return Conversation(habits, messages, fields), frozenset(wanted)

    def _document(self, conversation: Conversation, turns: Turns) -> Document:
        rendered = turns.rendered
        if not turns.ranges:
            reason = (
                "the chat template removes the thought of each one that is to be trained; "
                "set data.train_on: all_with_reasoning"
                if turns.thoughtless
                else "those that are to be trained are empty"
            )
            raise RowProblem("no-trained-token", f"messages: no assistant message is trained: {reason}")
        bos = self.tokenizer.bos_token
        if bos and rendered.text.startswith(f"{bos}{bos}"):
            raise RowProblem(
                "bos-doubled",
                f"messages: the text begins with {bos} twice; remove it from the message or from data.chat_template",
            )
        try:
            ids, trained = self.tokenization.marked(rendered.text, turns.ranges)
        except (TypeError, UnicodeEncodeError):
            raise RowProblem(
                "lone-surrogate", "messages: got half of a surrogate pair (such as \\ud83d), which is no character"
            ) from None
        spans = list(_spans(rendered, conversation.messages, turns.ranges))
        return Document(ids, trained, rendered.text, spans, tuple(sorted(turns.thoughtless)))


def _with_thoughts(conversation: Conversation, turns: Turns) -> Iterator[Turns]:
    """For the turns that lack their thought, the conversation up to the next user message, or up to the turn itself,
    with only them trained. The last ones come first."""
    lost, messages = turns.thoughtless, conversation.messages
    while lost:
        index = max(lost)
        next_user = next((n for n in range(index, len(messages)) if messages[n]["role"] == "user"), len(messages))
        for count in (next_user, index + 1):
            part = conversation.turns(count, {n for n in lost if n < count})
            if index not in part.thoughtless:
                break
        else:
            raise conversation.thought_problem(index, part.thoughtless[index])
        yield Turns(part.rendered, part.ranges, {})
        lost = part.thoughtless


def _spans(rendered: Rendered, messages: Sequence[Message], ranges: Sequence[Range]) -> Iterator[Span]:
    """The owners' text, cut where the trained ranges begin and end."""
    edges = sorted({edge for pair in ranges for edge in pair})
    for start, end, owner in rendered.owners:
        role = "" if owner is None else str(messages[owner]["role"])
        cuts = [start, *edges[bisect_right(edges, start) : bisect_left(edges, end)], end]
        for left, right in pairwise(cuts):
            number = bisect_right(ranges, (left, len(rendered.text))) - 1
            yield Span(role, left, right, number >= 0 and left < ranges[number][1])


def check_template(encoder: ChatEncoder) -> tuple[list[RowProblem], list[str]]:
    """What is wrong with the template and its tokenizer whatever the rows are, and what is worth knowing about them.

    Kinds: no-template, field-ignored, template-refuses, control-tokens-split, turn-without-end, and those of its
    `{% generation %}` blocks.
    """
    tokenizer = encoder.tokenizer
    try:
        habits = encoder.habits()
    except ValueError:  # transformers': no template, or named ones and none is the default
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        text = "the tokenizer has no chat template; set data.chat_template to a Jinja file"
        if named:
            text = (
                f"the tokenizer's chat templates are {', '.join(named)}, and none is the default; set "
                "data.chat_template to one of these names"
            )
        return [RowProblem("no-template", text)], []
    unread = [ignored_option(option) for option in encoder.options if option not in habits.variables]
    if unread:
        return unread, []
    notes: list[str] = []
    closing = habits.closing
    split = [token for token in control_tokens(habits.sample) if not _is_token(tokenizer, token)]
    at_end = [token for token in split if token in closing]
    if at_end:
        return [
            RowProblem(
                "control-tokens-split",
                f"the tokenizer splits {', '.join(split)} of the chat template into pieces, so no token ends a turn; "
                f"set model.add_tokens: {json.dumps(split)} and model.eos_token: {json.dumps(at_end[-1])}, or "
                "data.chat_template to one that has the tokenizer's own tokens",
            )
        ], []
    if split:
        notes.append(
            f"the tokenizer splits {', '.join(split)} of the chat template into pieces; model.add_tokens adds them"
        )
    try:
        encoder.encode({"messages": SAMPLE})
    except RowProblem as problem:
        text = f"a conversation of one question and one answer: {problem.text}"
        return [RowProblem(problem.kind, text)], notes
    ends = [end for end in habits.ends if end in closing]
    if tokenizer.eos_token not in closing and ends:
        notes.append(
            f"turns end with {' or '.join(sorted(ends))}, and the tokenizer's eos_token is {tokenizer.eos_token}: "
            "generation stops there only where the model's generation config says so; model.eos_token sets it"
        )
    if "strftime_now" in habits.template.source:
        notes.append("the chat template prints the date of the day on which rows are prepared")
    return [], notes


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1
