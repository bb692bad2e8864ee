"""The model that the quickstart's base run starts from: a tokenizer trained on the data, and random weights.

`python -m distft.quickstart.model DIR` reads DIR/data and writes DIR/base-untrained, without a network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, USER, ASSISTANT = SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 2048
CONTEXT = 512
SEED = 42

# The generation marks enclose the assistant's tokens: its text and the end token, but not the mark before the text.
CHAT_TEMPLATE = f"""\
{{{{- bos_token }}}}
{{%- for message in messages %}}
    {{%- if message.role == 'user' %}}
        {{{{- '{USER}' + message.content }}}}
    {{%- elif message.role == 'assistant' %}}
        {{{{- '{ASSISTANT}' }}}}
        {{%- generation %}}{{{{ message.content + eos_token }}}}{{% endgeneration %}}
    {{%- else %}}
        {{{{- raise_exception('the roles are user and assistant, not ' + message.role) }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
    {{{{- '{ASSISTANT}' }}}}
{{%- endif %}}
"""


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`: it encodes every string, and decodes it unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # A plain text starts with the token that a conversation starts with, so that the base model has seen it.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """0.9 million parameters: in a minute on two CPU cores, a larger model sees less text and learns less."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_untrained(folder: Path, texts: Iterable[str]) -> None:
    """Write a model folder with the tokenizer and random float32 weights from a fixed seed."""
    tokenizer = make_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(make_config(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_texts(data: Path) -> Iterator[str]:
    """All texts that are trained on. The held-out rows are not among them: the tokenizer must not see them either."""
    for line in (data / "base.jsonl").read_text().splitlines():
        yield json.loads(line)["text"]
    for line in (data / "train.jsonl").read_text().splitlines():
        yield from (message["content"] for message in json.loads(line)["messages"])


if __name__ == "__main__":
    make_untrained(Path(sys.argv[1]) / "base-untrained", read_texts(Path(sys.argv[1]) / "data"))
