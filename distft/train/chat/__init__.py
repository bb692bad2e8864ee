"""Conversations → token ids and which of them are trained.

Rendered by the chat template, tokenized once; the ids are those of `apply_chat_template`. Trained is all that the
assistant produces: its thought as the template prints it, its answer, its tool calls, the token that ends its turn and
the line break after that; not the header that the generation prompt gives. Where trl has a version of the template with
`{% generation %}` marks that renders the same text, its marks decide, so that the mask is the one of trl's
`assistant_only_loss`.
"""

from distft.data.problems import RowProblem
from distft.train.chat.encoder import ChatEncoder, Document, Span, TrainOn, check_template
from distft.train.chat.tokenize import Tokenization, Tokens, TokensDifferError

__all__ = [
    "ChatEncoder",
    "Document",
    "RowProblem",
    "Span",
    "Tokenization",
    "Tokens",
    "TokensDifferError",
    "TrainOn",
    "check_template",
]
