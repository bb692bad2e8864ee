"""Which models keep the documents of a packed row apart."""

from __future__ import annotations

# Model types of transformers 5.17 to 5.23 in which a token of a packed row sees the document before its own, although
# position ids start again there. Found with tiny models of every type: the first document was changed, and the outputs
# of the second compared (tests/unit/test_packing.py).
# Attention that does not build its mask from position ids:
BY_MASK = frozenset(
    [
        "afmoe",
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "biogpt",
        "blenderbot",
        "blenderbot-small",
        "bloom",
        "camembert",
        "cpmant",
        "data2vec-text",
        "deepseek_v4",
        "electra",
        "ernie",
        "falcon",
        "gpt_oss",
        "marian",
        "mbart",
        "megatron-bert",
        "mpt",
        "mvp",
        "openai-gpt",
        "opt",
        "pegasus",
        "plbart",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "xglm",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
    ]
)
# A recurrence or a convolution that runs on through the row:
BY_STATE = frozenset(
    [
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "granitemoehybrid",
        "inkling_text",
        "inkling2_text",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "qwen4_exp",
        "qwen4_exp_text",
        "recurrent_gemma",
        "zamba",
        "zamba2",
        "zaya",
    ]
)
# The same without any attention, so that not even FlashAttention's kernels could tell documents apart:
NO_ATTENTION = frozenset(["falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"])


def why_mixed(kind: str, flash: bool = False) -> str | None:
    """Why documents of a packed row would see each other in models of the type `kind`; None where they do not.

    Args:
        flash: attention is FlashAttention-2, whose kernels get the bounds of documents. Whether models that build masks
            of their own respect these could not be tested, and counts as yes.
    """
    if kind in NO_ATTENTION | BY_STATE:
        return f"the state of {kind} carries over from one document to the next"
    if kind in BY_MASK and not flash:
        return f"the attention of {kind} does not see where a document in a packed row begins"
    return None
