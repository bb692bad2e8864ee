"""Published models: the shapes in their config.json on the hub (hub id beside each)."""

from __future__ import annotations

from typing import Any


def _config(
    kind: str, vocab: int, hidden: int, layers: int, heads: int, kv: int, mlp: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        **more,
    }


TIED: dict[str, Any] = {"tie_word_embeddings": True}

CONFIGS: dict[str, dict[str, Any]] = {
    # HuggingFaceTB/SmolLM2-135M, -360M, -1.7B; TinyLlama/TinyLlama-1.1B-Chat-v1.0; deepseek-coder-1.3b-instruct
    "smollm2-135m": _config("llama", 49152, 576, 30, 9, 3, 1536, **TIED),
    "smollm2-360m": _config("llama", 49152, 960, 32, 15, 5, 2560, **TIED),
    "smollm2-1.7b": _config("llama", 49152, 2048, 24, 32, 32, 8192, **TIED),
    "tinyllama": _config("llama", 32000, 2048, 22, 32, 4, 5632),
    "deepseek-1.3b": _config("llama", 32256, 2048, 24, 16, 16, 5504),
    # meta-llama/Llama-3.2-1B, -3.2-3B, -3.1-8B, -3.1-70B, -3.1-405B, meta-llama/Llama-2-7b-hf, -13b-hf
    "llama-3.2-1b": _config("llama", 128256, 2048, 16, 32, 8, 8192, head_dim=64, **TIED),
    "llama-3.2-3b": _config("llama", 128256, 3072, 28, 24, 8, 8192, head_dim=128, **TIED),
    "llama-3.1-8b": _config("llama", 128256, 4096, 32, 32, 8, 14336),
    "llama-3.1-70b": _config("llama", 128256, 8192, 80, 64, 8, 28672),
    "llama-3.1-405b": _config("llama", 128256, 16384, 126, 128, 8, 53248),
    "llama-2-7b": _config("llama", 32000, 4096, 32, 32, 32, 11008),
    "llama-2-13b": _config("llama", 32000, 5120, 40, 40, 40, 13824),
    # Qwen/Qwen2.5-0.5B, -1.5B, -7B, -32B; Qwen/Qwen3-0.6B, -4B, -8B; Qwen/Qwen1.5-MoE-A2.7B
    "qwen2.5-0.5b": _config("qwen2", 151936, 896, 24, 14, 2, 4864, **TIED),
    "qwen2.5-1.5b": _config("qwen2", 151936, 1536, 28, 12, 2, 8960, **TIED),
    "qwen2.5-7b": _config("qwen2", 152064, 3584, 28, 28, 4, 18944),
    "qwen2.5-32b": _config("qwen2", 152064, 5120, 64, 40, 8, 27648),
    "qwen3-0.6b": _config("qwen3", 151936, 1024, 28, 16, 8, 3072, head_dim=128, **TIED),
    "qwen3-4b": _config("qwen3", 151936, 2560, 36, 32, 8, 9728, head_dim=128, **TIED),
    "qwen3-8b": _config("qwen3", 151936, 4096, 36, 32, 8, 12288, head_dim=128),
    "qwen1.5-moe": _config(
        "qwen2_moe",
        151936,
        2048,
        24,
        16,
        16,
        5632,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    # Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": _config(
        "qwen3_moe",
        151936,
        2048,
        48,
        32,
        4,
        6144,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    # google/gemma-2-2b, -2-9b, google/gemma-3-1b-pt
    "gemma-2-2b": _config("gemma2", 256000, 2304, 26, 8, 4, 9216, head_dim=256, sliding_window=4096, **TIED),
    "gemma-2-9b": _config("gemma2", 256000, 3584, 42, 16, 8, 14336, head_dim=256, sliding_window=4096, **TIED),
    "gemma-3-1b": _config("gemma3_text", 262144, 1152, 26, 4, 1, 6912, head_dim=256, sliding_window=512, **TIED),
    # microsoft/Phi-3-mini-4k-instruct
    "phi-3-mini": _config("phi3", 32064, 3072, 32, 32, 32, 8192, sliding_window=2047),
    # microsoft/phi-2
    "phi-2": _config("phi", 51200, 2560, 32, 32, 32, 10240, partial_rotary_factor=0.4),
    # openai-community/gpt2, gpt2-xl
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
    },
    "gpt2-xl": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "n_positions": 1024,
    },
    # EleutherAI/gpt-j-6b
    "gpt-j-6b": {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16},
    # mistralai/Mistral-7B-v0.1, -v0.3, mistralai/Mixtral-8x7B-v0.1
    "mistral-7b-0.1": _config("mistral", 32000, 4096, 32, 32, 8, 14336, sliding_window=4096),
    "mistral-7b": _config("mistral", 32768, 4096, 32, 32, 8, 14336, sliding_window=None),
    "mixtral-8x7b": _config(
        "mixtral", 32000, 4096, 32, 32, 8, 14336, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    ),
    # HuggingFaceTB/SmolLM3-3B, allenai/OLMo-2-1124-7B, bigcode/starcoder2-3b
    "smollm3-3b": _config("smollm3", 128256, 2048, 36, 16, 4, 11008, **TIED),
    "olmo-2-7b": _config("olmo2", 100352, 4096, 32, 32, 32, 11008),
    "starcoder2-3b": _config("starcoder2", 49152, 3072, 30, 24, 2, 12288, sliding_window=4096, **TIED),
    # tiiuae/falcon-7b
    "falcon-7b": {
        "model_type": "falcon",
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "new_decoder_architecture": False,
        "alibi": False,
    },
    # EleutherAI/pythia-160m, pythia-1.4b
    "pythia-160m": _config("gpt_neox", 50304, 768, 12, 12, 12, 3072, rotary_pct=0.25),
    "pythia-1.4b": _config("gpt_neox", 50304, 2048, 24, 16, 16, 8192, rotary_pct=0.25),
    # facebook/opt-1.3b
    "opt-1.3b": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
        "word_embed_proj_dim": 2048,
        "max_position_embeddings": 2048,
    },
    # bigscience/bloom-560m, bloom-7b1
    "bloom-560m": {"model_type": "bloom", "vocab_size": 250880, "n_embed": 1024, "n_layer": 24, "n_head": 16},
    "bloom-7b1": {"model_type": "bloom", "vocab_size": 250880, "n_embed": 4096, "n_layer": 30, "n_head": 32},
    # CohereLabs/aya-23-8B, c4ai-command-r-v01, c4ai-command-r7b-12-2024
    "aya-23-8b": _config("cohere", 256000, 4096, 32, 32, 8, 14336, **TIED),
    "command-r": _config("cohere", 256000, 8192, 40, 64, 64, 22528, **TIED),
    "command-r7b": _config("cohere2", 256000, 4096, 32, 32, 8, 14336, **TIED),
    # openai/gpt-oss-20b, ByteDance-Seed/Seed-OSS-36B-Base
    "gpt-oss-20b": _config(
        "gpt_oss", 201088, 2880, 24, 64, 8, 2880, head_dim=64, num_local_experts=32, num_experts_per_tok=4
    ),
    "seed-oss-36b": _config("seed_oss", 155136, 5120, 64, 80, 8, 27648, head_dim=128),
    # ibm-granite/granite-3.1-2b-base
    "granite-3.1-2b": _config("granite", 49152, 2048, 40, 32, 8, 8192, **TIED),
    # stabilityai/stablelm-3b-4e1t
    "stablelm-3b": _config("stablelm", 50304, 2560, 32, 32, 32, 6912, partial_rotary_factor=0.25),
}
