"""A chat template that also tells which text comes from which message.

The template is compiled a second time with signs in it: at the top of every loop (whose message is this?) and around
every `{% generation %}` block. The text with the signs taken out must be the very text of `apply_chat_template`, so
what they say about it is proven, row by row, and one more rendering is enough however many turns a conversation has.
transformers' own tracker counts what was printed before the block, which is wrong inside a macro or a set block; signs
travel with the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from distft.train.chat.messages import Message

if TYPE_CHECKING:
    from jinja2 import Environment, Template, nodes
    from transformers import PreTrainedTokenizerBase

_Owners = tuple[tuple[int, int, "int | None"], ...]
SIGN = "_distft_sign"  # the function that the compiled template calls
# Where the text already holds the first of these private-use characters, the next one is taken. transformers uses
# U+F0000 and U+F0001 itself.
_SIGNS = [chr(0xF0F00 + n) for n in range(8)]


class TemplateRefuses(Exception):
    """The template raised an error of its own: a role or an order that it does not take, or a bug in it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. `owners` covers the text in order: (start, end, index of the message or None for text
    that belongs to none). `marks` are the `{% generation %}` blocks: (start, end), or None where the template has none
    or they cannot be found in the text. `by_signs`: the owners are what the template says. Positions are characters."""

    text: str
    owners: _Owners
    marks: tuple[tuple[int, int], ...] | None
    by_signs: bool = True

    @cached_property
    def spans(self) -> dict[int | None, list[tuple[int, int]]]:
        """The (start, end) of each owner's text."""
        spans: dict[int | None, list[tuple[int, int]]] = {}
        for start, end, owner in self.owners:
            spans.setdefault(owner, []).append((start, end))
        return spans

    def own(self, index: int | None) -> str:
        """The text of one message, or with None the text that belongs to no message."""
        return "".join(self.text[start:end] for start, end in self.spans.get(index, ()))


class ChatTemplate:
    """One template of one tokenizer.

    `source` is the Jinja text, `options` are variables for it beyond messages, tools and documents.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, options: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.source = source
        self.options = dict(options or {})

    def render(self, messages: Sequence[Message], *, prompt: bool = False, **fields: Any) -> str:
        """The text of `apply_chat_template`, with the generation prompt where `prompt`.

        `fields` are tools and documents.

        Raises:
            TemplateRefuses: the template raised an error.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=prompt,
                **fields,
                **self.options,
            )
        except Exception as error:  # jinja2's errors, what raise_exception gives, and TypeErrors of its expressions
            raise TemplateRefuses(str(error) or type(error).__name__) from None
        return str(text)

    def render_turns(self, messages: Sequence[Message], **fields: Any) -> Rendered:
        """The text with its owners and marks.

        Where the signs change the text (a template that measures or cuts what it printed before), the owners come from
        rendering every beginning of the conversation, which takes quadratic time; where that fails too, from nowhere:
        all text is then nobody's.
        """
        text = self.render(messages, **fields)
        signed = self.find_turns(text, messages, **fields)
        if signed is not None and any(owner is not None for _, _, owner in signed.owners):
            return signed
        return Rendered(text, self._by_beginnings(text, messages, fields), signed.marks if signed else None, False)

    def find_turns(self, text: str, messages: Sequence[Message], **fields: Any) -> Rendered | None:
        """The owners and marks of `text`, or None where this template does not render `messages` to it."""
        sign = next((sign for sign in _SIGNS if sign not in text), None)
        if sign is None:
            return None
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {
            **self.tokenizer.special_tokens_map,
            "tools": None,
            "documents": None,
            **fields,
            **self.options,
            "messages": messages,
            "add_generation_prompt": False,
            SIGN: _Signs(messages, sign),
        }
        compiled = _compile(self.source)
        try:
            signed = compiled.template.render(variables)
        except Exception:  # the signs are in the way, or this is another template than the one that gave the text
            return None
        rendered = _read_signs(signed, sign)
        if rendered is None or rendered.text != text:
            return None
        return rendered if compiled.is_marked else replace(rendered, marks=None)

    def _by_beginnings(self, text: str, messages: Sequence[Message], fields: Mapping[str, Any]) -> _Owners:
        """Owners by what the text gains with each message, as far as each beginning's text begins the whole text."""
        ends: list[int | None] = []
        for count in range(1, len(messages) + 1):
            try:
                beginning = self.render(messages[:count], **fields)
            except TemplateRefuses:
                ends.append(None)
            else:
                ends.append(len(beginning) if text.startswith(beginning) else None)
        owners: list[tuple[int, int, int | None]] = []
        done, known = 0, True  # known: whether the message before ends where `done` says
        for index, end in enumerate(ends):
            if end is not None and end >= done:
                if end > done:
                    owners.append((done, end, index if known else None))
                done = end
            known = end is not None
        if done < len(text):
            owners.append((done, len(text), None))
        return tuple(owners)


class _Signs:
    """What the compiled template calls: it returns a sign where the owner of the text changes, else nothing."""

    def __init__(self, messages: Sequence[Message], sign: str):
        self._index = {id(message): index for index, message in enumerate(messages)}
        self._roles = [message["role"] for message in messages]
        self._sign = sign
        self._owner: int | None = None
        self._outside: list[int | None] = []  # the owner around each loop that is open

    def __call__(self, step: str, value: Any = None) -> str:
        if step in "()":
            return f"{self._sign}{step}{self._sign}"
        before = self._owner
        if step == "enter":
            self._outside.append(before)
        elif step == "leave":
            self._owner = self._outside.pop()
        elif step == "item":
            self._owner = self._owner_of(value, self._outside[-1])
        else:  # "set"
            self._owner = self._owner_of(value, before)
        if self._owner == before:
            return ""
        return f"{self._sign}{'' if self._owner is None else self._owner}{self._sign}"

    def _owner_of(self, value: Any, outside: int | None) -> int | None:
        """Within the text of a message, a loop over others looks something up (Command R: which call a result answers);
        only results of the assistant's tool calls are printed there as text of their own (Gemma 4)."""
        index = self._index.get(id(value))
        if index is None or outside is None:
            return outside if index is None else index
        is_result = self._roles[index] == "tool" and self._roles[outside] == "assistant" and index > outside
        return index if is_result else outside


def _read_signs(signed: str, sign: str) -> Rendered | None:
    """The text without its signs, or None where a sign was cut by the template."""
    pieces = signed.split(sign)
    if len(pieces) % 2 == 0:
        return None
    text: list[str] = []
    owners: list[tuple[int, int, int | None]] = []
    marks: list[tuple[int, int]] = []
    position, owner, opened = 0, None, None
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            if piece:
                if owners and owners[-1][2] == owner:
                    owners[-1] = (owners[-1][0], position + len(piece), owner)
                else:
                    owners.append((position, position + len(piece), owner))
                text.append(piece)
                position += len(piece)
        elif piece == "(":
            opened = position
        elif piece == ")":
            if opened is None:
                return None
            if position > opened:
                marks.append((opened, position))
            opened = None
        elif piece == "" or piece.isdecimal():
            owner = int(piece) if piece else None
        else:
            return None
    return Rendered("".join(text), tuple(owners), tuple(marks))


def environment_of(source: str) -> Environment:
    """The sandbox that transformers makes for a template, with its filters, globals and extensions."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: Environment = _compile_jinja_template(source).environment
    return environment


@dataclass(frozen=True)
class _Compiled:
    template: Template
    is_marked: bool


@lru_cache(maxsize=32)
def _compile(source: str) -> _Compiled:
    """The template with signs."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    environment = environment_of(source)

    def sign(step: str, at: nodes.Node, *values: nodes.Expr) -> nodes.Node:
        call = nodes.Call(nodes.Name(SIGN, "load"), [nodes.Const(step), *values], [], None, None)
        return nodes.Output([call]).set_lineno(at.lineno, override=True).set_environment(environment)

    class Signer(NodeTransformer):
        is_marked = False

        def __init__(self) -> None:
            self.targets: list[str] = []  # the variables of the loops that are open

        def visit_For(self, node: nodes.For) -> list[nodes.Node]:
            name = node.target.name if isinstance(node.target, nodes.Name) else None
            self.targets.append(name or "")
            self.generic_visit(node)
            self.targets.pop()
            value = nodes.Name(name, "load") if name else nodes.Const(None)
            node.body.insert(0, sign("item", node, value))
            return [sign("enter", node), node, sign("leave", node)]

        def visit_Assign(self, node: nodes.Assign) -> nodes.Node | list[nodes.Node]:
            """`{% for i in range(n) %}{% set message = messages[i] %}` is a loop over messages too."""
            value = node.node
            if (
                isinstance(node.target, nodes.Name)
                and isinstance(value, nodes.Getitem)
                and isinstance(value.arg, nodes.Name)
                and value.arg.name in self.targets
            ):
                return [node, sign("set", node, nodes.Name(node.target.name, "load"))]
            return node

        def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
            self.generic_visit(node)
            called = node.call.node
            if isinstance(called, nodes.ExtensionAttribute) and called.name == "_generation_support":
                self.is_marked = True
                node.body = [sign("(", node), *node.body, sign(")", node)]
            return node

    signer = Signer()
    tree = signer.visit(environment.parse(source))
    code = environment.compile(tree)
    template = environment.template_class.from_code(environment, code, environment.make_globals(None))
    return _Compiled(template, signer.is_marked)
