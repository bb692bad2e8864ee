"""The families of models that are planned from config.json alone, as data: layouts, and defaults of config classes.

Sources: configuration_*.py and modeling_*.py of transformers 5, for the classes that AutoModelForCausalLM picks by
model_type. test_model_shapes.py holds each family equal to them, name by name, and each default to its class's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]
Rule = Callable[[Config, int], Any]  # takes a config with defaults filled in, and a layer's index

LLAMA_OUTSIDE = "model.embed_tokens embedding V h\nmodel.norm norm h\nlm_head output V h\n"


@dataclass(frozen=True)
class Family:
    """How a model follows from its config.json. Layouts: see layout.py; their symbols: `symbols` in architecture.py."""

    defaults: Config  # of the config class, by the names in Sizes where there is one
    block: str  # rows of a block
    outside: str = LLAMA_OUTSIDE  # rows of everything else
    blocks: str = "model.layers"
    keys: Mapping[str, str] = field(default_factory=dict)  # the config's own names for a size; the first one wins
    unread: tuple[str, ...] = ()  # sizes that the classes do not read from the config
    derive: Callable[[Config], Config] = lambda c: {}  # switches that follow from several keys
    sliding: Rule = lambda c, i: True  # whether layer i has the sliding window, if there is one
    sparse: Rule = lambda c, i: True  # whether layer i has experts, if there are any
    gated: bool = True
    parallel: str = "no"  # a switch: attention and MLP read the same input
    peft_experts: str | None = None  # which of peft's tables for experts applies (lora.py)
    vision: Family | None = None  # of its vision_config


def _family(defaults: Config, *block: str, **more: Any) -> Family:
    return Family(defaults, "".join(block), **more)


def _sizes(vocab: int, hidden: int, mlp: int | None, layers: int, heads: int, kv: int | None, **more: Any) -> Config:
    """`mlp` None: 4 x hidden. `kv` None: as many key-value heads as heads."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": None,  # hidden / heads
        "tie_word_embeddings": False,
        **more,
    }


def _attention(qkv: str = "no", out: str = "no", name: str = "self_attn", o_proj: str = "o_proj") -> str:
    """Separate projections, with the switches of their biases."""
    return f"""
        {name}.q_proj linear q h bias={qkv}
        {name}.k_proj linear kv h bias={qkv}
        {name}.v_proj linear kv h bias={qkv}
        {name}.{o_proj} linear h q bias={out}
        """


def _gated(bias: str = "no", name: str = "mlp", when: str = "yes", size: str = "f") -> str:
    return f"""
        {name}.gate_proj linear {size} h bias={bias} if={when}
        {name}.up_proj linear {size} h bias={bias} if={when}
        {name}.down_proj linear h {size} bias={bias} if={when}
        """


def _plain(up: str, down: str, bias: str = "yes") -> str:
    return f"{up} linear f h bias={bias}\n{down} linear h f bias={bias}\n"


def _fused(attention: str, bias: str = "yes") -> str:
    """Query, key and value in one matrix, as in GPT-NeoX, Falcon and BLOOM."""
    names = f"{attention}.query_key_value linear qkv h bias={bias}\n{attention}.dense linear h q bias={bias}\n"
    return names + _plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias)


def _experts(router: str, name: str = "mlp", when: str = "yes", kind: str = "router") -> str:
    return f"""
        {name}.{router} {kind} e h if={when}
        {name}.experts.gate_up_proj experts e 2m h if={when}
        {name}.experts.down_proj experts e h m if={when}
        """


def _norms(*names: str, size: str = "h", bias: str = "no", when: str = "yes") -> str:
    return "".join(f"{name} norm {size} bias={bias} if={when}\n" for name in names)


def _every(interval: int, key: str = "") -> Rule:
    """Every n-th layer has full attention, the others a sliding window."""
    return lambda c, i: (i + 1) % (c.get(key) or interval)


BIASED = _attention("attention_bias", "attention_bias")
GATED = _gated()
PRE = ("input_layernorm", "post_attention_layernorm")
NORMS = _norms(*PRE)
POST_NORMS = _norms("post_attention_layernorm", "post_feedforward_layernorm")
FOUR_NORMS = NORMS + _norms("pre_feedforward_layernorm", "post_feedforward_layernorm")
LAYER_NORMS = _norms(*PRE, bias="yes")
HEAD_NORMS = _norms("self_attn.q_norm", "self_attn.k_norm", size="d")  # per head
WHOLE_NORMS = _norms("self_attn.q_norm", size="q") + _norms("self_attn.k_norm", size="kv")
LAYER_NORM_OUTSIDE = LLAMA_OUTSIDE.replace("model.norm norm h", "model.norm norm h bias=yes")
GPT_OUTSIDE = """
    transformer.wte embedding V h
    transformer.wpe embedding P h
    transformer.ln_f norm h bias=yes
    lm_head output V h
    """
GPT_NORMS = _norms("ln_1", "ln_2", bias="yes")
GPT_KEYS = {
    "hidden_size": "n_embd hidden_size",
    "num_hidden_layers": "n_layer num_hidden_layers",
    "num_attention_heads": "n_head num_attention_heads",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions max_position_embeddings",
}
EQUAL_HEADS = ("head_dim", "num_key_value_heads")
EXPERTS = {"num_experts": "num_local_experts num_experts"}


def _gpt(defaults: Config, *block: str, outside: str = GPT_OUTSIDE, **more: Any) -> Family:
    common = {"blocks": "transformer.h", "keys": GPT_KEYS, "unread": EQUAL_HEADS, "gated": False}
    return _family(defaults, *block, outside=outside, **{**common, **more})


def _falcon(c: Config) -> Config:
    """Falcon-7B has one key-value head and one norm; 40B (the new architecture) has groups of heads and two norms."""
    groups = c["num_kv_heads"] or c["num_attention_heads"]
    norms = c["num_ln_in_parallel_attn"] or (2 if c["new_decoder_architecture"] else None)
    two = bool(c["parallel_attn"]) and norms == 2
    kv = groups if c["new_decoder_architecture"] else 1 if c["multi_query"] else c["num_attention_heads"]
    return {"num_key_value_heads": kv, "two_norms": two, "one_norm": not two}


def _opt(c: Config) -> Config:
    width = c["word_embed_proj_dim"] or c["hidden_size"]
    final = c["do_layer_norm_before"] and not c["_remove_final_layer_norm"] and c["layer_norm_elementwise_affine"]
    return {"word_embed_proj_dim": width, "projected": width != c["hidden_size"], "final_norm": final}


def _qwen_sparse(c: Config, i: int) -> bool:
    return i not in (c["mlp_only_layers"] or ()) and (i + 1) % c["decoder_sparse_step"] == 0


def _no_rope(c: Config, i: int) -> bool:
    return not (c["no_rope_layers"][i] if c["no_rope_layers"] else (i + 1) % c["no_rope_layer_interval"])


NO_BIAS: Config = {"attention_bias": False}
TIED: Config = {"tie_word_embeddings": True}
WINDOW: Config = {"sliding_window": 4096}
QWEN_WINDOW: Config = {**WINDOW, "use_sliding_window": False, "max_window_layers": 28}
QWEN_MOE: Config = {**WINDOW, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": None}
GEMMA: Config = {"head_dim": 256, **TIED, **NO_BIAS}

# The vision tower of Gemma 3.
SIGLIP = _family(
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "vision_use_head": True,
    },
    _norms("layer_norm1", "layer_norm2", bias="yes"),
    _attention("yes", "yes", o_proj="out_proj"),
    _plain("mlp.fc1", "mlp.fc2"),
    outside="""
        model.vision_tower.embeddings.patch_embedding conv2d h channels patch patch bias=yes
        model.vision_tower.embeddings.position_embedding embedding patches h
        model.vision_tower.post_layernorm norm h bias=yes
        model.vision_tower.head.probe param 1 1 h if=vision_use_head
        model.vision_tower.head.attention.in_proj_weight param 3h h if=vision_use_head
        model.vision_tower.head.attention.in_proj_bias param 3h if=vision_use_head
        model.vision_tower.head.attention.out_proj linear h h bias=yes if=vision_use_head
        model.vision_tower.head.layernorm norm h bias=yes if=vision_use_head
        model.vision_tower.head.mlp.fc1 linear f h bias=yes if=vision_use_head
        model.vision_tower.head.mlp.fc2 linear h f bias=yes if=vision_use_head
        """,
    blocks="model.vision_tower.encoder.layers",
    unread=EQUAL_HEADS,
)
GEMMA3 = (_sizes(262208, 2304, 9216, 26, 8, 4, **GEMMA, **WINDOW), BIASED, HEAD_NORMS, GATED, FOUR_NORMS)
SIX = _every(6, "sliding_window_pattern")

FAMILIES: dict[str, Family] = {
    "llama": _family(
        _sizes(32000, 4096, 11008, 32, 32, None, mlp_bias=False, **NO_BIAS), BIASED, _gated("mlp_bias"), NORMS
    ),
    "mistral": _family(_sizes(32000, 4096, 14336, 32, 32, 8, **WINDOW), _attention(), GATED, NORMS),
    "ministral3": _family(
        _sizes(131072, 4096, 14336, 34, 32, 8, head_dim=128, sliding_window=None), _attention(), GATED, NORMS
    ),
    "mixtral": _family(
        _sizes(32000, 4096, 14336, 32, 32, 8, num_experts=8, num_experts_per_tok=2, sliding_window=None),
        _attention(),
        _experts("gate"),
        NORMS,
        keys=EXPERTS,
        peft_experts="mixtral",
    ),
    "qwen2": _family(
        _sizes(151936, 4096, 22016, 32, 32, 32, **QWEN_WINDOW),
        _attention("yes"),
        GATED,
        NORMS,
        sliding=lambda c, i: i >= c["max_window_layers"],
    ),
    "qwen3": _family(
        _sizes(151936, 4096, 22016, 32, 32, 32, **QWEN_WINDOW, **NO_BIAS) | {"head_dim": 128},
        BIASED,
        HEAD_NORMS,
        GATED,
        NORMS,
        sliding=lambda c, i: i >= c["max_window_layers"],
    ),
    "qwen2_moe": _family(
        _sizes(151936, 2048, 5632, 24, 16, 16, num_experts=60, num_experts_per_tok=4, qkv_bias=True, **QWEN_MOE)
        | {"moe_intermediate_size": 1408, "shared_intermediate_size": 5632, "max_window_layers": 28},
        _attention("qkv_bias"),
        _experts("gate", when="sparse"),
        _gated(name="mlp.shared_expert", when="sparse", size="s"),
        "mlp.shared_expert_gate linear 1 h if=sparse\n",
        _gated(when="!sparse"),
        NORMS,
        keys={"shared_intermediate_size": "shared_expert_intermediate_size"},
        sliding=lambda c, i: i < c["max_window_layers"] and (i + 1) % 2,
        sparse=_qwen_sparse,
    ),
    "qwen3_moe": _family(
        _sizes(151936, 2048, 6144, 24, 32, 4, num_experts=128, num_experts_per_tok=8, **QWEN_MOE, **NO_BIAS)
        | {"moe_intermediate_size": 768},
        BIASED,
        HEAD_NORMS,
        _experts("gate", when="sparse"),
        _gated(when="!sparse"),
        NORMS,
        keys=EXPERTS,
        sparse=_qwen_sparse,
        peft_experts="qwen2_moe",
    ),
    "gemma": _family(_sizes(256000, 3072, 24576, 28, 16, 16, **GEMMA), BIASED, GATED, NORMS),
    "gemma2": _family(
        _sizes(256000, 2304, 9216, 26, 8, 4, **GEMMA, **WINDOW), BIASED, GATED, FOUR_NORMS, sliding=_every(2)
    ),
    "gemma3_text": _family(*GEMMA3, sliding=SIX),
    "gemma3": _family(
        *GEMMA3,
        outside="""
            model.language_model.embed_tokens embedding V h
            model.language_model.norm norm h
            model.multi_modal_projector.mm_input_projection_weight param vision h
            model.multi_modal_projector.mm_soft_emb_norm norm vision
            lm_head output V h
            """,
        blocks="model.language_model.layers",
        sliding=SIX,
        vision=SIGLIP,
    ),
    "phi": _family(
        _sizes(51200, 2048, 8192, 24, 32, None, qk_layernorm=False),
        _attention("yes", "yes", o_proj="dense"),
        _norms("self_attn.q_layernorm", "self_attn.k_layernorm", size="d", bias="yes", when="qk_layernorm"),
        _plain("mlp.fc1", "mlp.fc2"),
        _norms("input_layernorm", bias="yes"),
        outside="model.embed_tokens embedding V h\nmodel.final_layernorm norm h bias=yes\nlm_head output V h bias=yes",
        gated=False,
        parallel="yes",
    ),
    "phi3": _family(
        _sizes(32064, 3072, 8192, 32, 32, None, sliding_window=None),
        "self_attn.qkv_proj linear qkv h\nself_attn.o_proj linear h q\n",
        "mlp.gate_up_proj linear 2f h\nmlp.down_proj linear h f\n",
        NORMS,
    ),
    "phimoe": _family(
        _sizes(32064, 4096, 6400, 32, 32, 8, num_experts=16, num_experts_per_tok=2, sliding_window=None, **NO_BIAS)
        | {"lm_head_bias": False},
        BIASED,
        _experts("router", kind="linear"),  # its class inherits from Linear
        LAYER_NORMS,
        outside=LAYER_NORM_OUTSIDE.replace("lm_head output V h", "lm_head output V h bias=lm_head_bias"),
        keys=EXPERTS,
    ),
    "gpt2": _gpt(
        _sizes(50257, 768, None, 12, 12, None, max_position_embeddings=1024, **TIED),
        GPT_NORMS,
        "attn.c_attn conv1d h qkv bias=yes\nattn.c_proj conv1d q h bias=yes\n",
        "mlp.c_fc conv1d h f bias=yes\nmlp.c_proj conv1d f h bias=yes\n",
    ),
    "gpt_bigcode": _gpt(
        _sizes(50257, 768, None, 12, 12, None, max_position_embeddings=1024, multi_query=True, **TIED),
        GPT_NORMS,
        "attn.c_attn linear qkv h bias=yes\nattn.c_proj linear h q bias=yes\n",
        _plain("mlp.c_fc", "mlp.c_proj"),
        derive=lambda c: {"num_key_value_heads": 1 if c["multi_query"] else c["num_attention_heads"]},
    ),
    "gptj": _gpt(
        _sizes(50400, 4096, None, 28, 16, None),
        _norms("ln_1", bias="yes"),
        _attention(name="attn", o_proj="out_proj"),
        _plain("mlp.fc_in", "mlp.fc_out"),
        outside="transformer.wte embedding V h\ntransformer.ln_f norm h bias=yes\nlm_head output V h bias=yes",
        parallel="yes",
    ),
    "gpt_neox": _family(
        _sizes(50432, 6144, 24576, 44, 64, None, attention_bias=True, use_parallel_residual=True),
        "attention.query_key_value linear qkv h bias=attention_bias\nattention.dense linear h q bias=attention_bias\n",
        _plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        LAYER_NORMS,
        outside="gpt_neox.embed_in embedding V h\ngpt_neox.final_layer_norm norm h bias=yes\nlm_head output V h",
        blocks="gpt_neox.layers",
        unread=EQUAL_HEADS,
        gated=False,
        parallel="use_parallel_residual",
    ),
    "falcon": _family(
        _sizes(65024, 4544, None, 32, 71, None, num_kv_heads=None, multi_query=True, bias=False, **TIED)
        | {"new_decoder_architecture": False, "parallel_attn": True, "num_ln_in_parallel_attn": None},
        _fused("self_attention", "bias"),
        _norms("input_layernorm", bias="yes", when="one_norm"),
        _norms("post_attention_layernorm", bias="yes", when="!parallel_attn"),
        _norms("ln_attn", "ln_mlp", bias="yes", when="two_norms"),
        outside="transformer.word_embeddings embedding V h\ntransformer.ln_f norm h bias=yes\nlm_head output V h",
        blocks="transformer.h",
        keys={"hidden_size": "n_embed hidden_size", "intermediate_size": "ffn_hidden_size"},
        unread=EQUAL_HEADS,
        derive=_falcon,
        gated=False,
        parallel="parallel_attn",
    ),
    "bloom": _family(
        _sizes(250880, 64, None, 2, 8, None, **TIED),
        _fused("self_attention"),
        LAYER_NORMS,
        outside="transformer.word_embeddings embedding V h\ntransformer.ln_f norm h bias=yes\nlm_head output V h\n"
        "transformer.word_embeddings_layernorm norm h bias=yes",
        blocks="transformer.h",
        keys=GPT_KEYS | {"hidden_size": "n_embed hidden_size"},
        unread=(*EQUAL_HEADS, "intermediate_size"),
        gated=False,
    ),
    "opt": _family(
        _sizes(50272, 768, 3072, 12, 12, None, max_position_embeddings=2048, word_embed_proj_dim=None, **TIED)
        | {"enable_bias": True, "layer_norm_elementwise_affine": True}
        | {"do_layer_norm_before": True, "_remove_final_layer_norm": False},
        _attention("enable_bias", "enable_bias", o_proj="out_proj"),
        _plain("fc1", "fc2", "enable_bias"),
        _norms("self_attn_layer_norm", "final_layer_norm", bias="yes", when="layer_norm_elementwise_affine"),
        outside="""
            model.decoder.embed_tokens embedding V width
            model.decoder.embed_positions embedding P+2 h
            model.decoder.project_in linear h width if=projected
            model.decoder.project_out linear width h if=projected
            model.decoder.final_layer_norm norm h bias=yes if=final_norm
            lm_head output V width
            """,
        blocks="model.decoder.layers",
        keys={"intermediate_size": "ffn_dim"},
        unread=EQUAL_HEADS,
        derive=_opt,
        gated=False,
    ),
    "starcoder2": _family(
        _sizes(49152, 3072, 12288, 30, 24, 2, use_bias=True, sliding_window=None, **TIED),
        _attention("use_bias", "use_bias"),
        _plain("mlp.c_fc", "mlp.c_proj", "use_bias"),
        LAYER_NORMS,
        outside=LAYER_NORM_OUTSIDE,
        gated=False,
    ),
    "olmo": _family(
        _sizes(50304, 4096, 11008, 32, 32, None, **NO_BIAS),
        BIASED,
        GATED,
        outside="model.embed_tokens embedding V h\nlm_head output V h",  # its norms have no parameters
    ),
    "olmo2": _family(_sizes(50304, 4096, 11008, 32, 32, None, **NO_BIAS), BIASED, WHOLE_NORMS, GATED, POST_NORMS),
    "olmo3": _family(
        _sizes(50304, 4096, 11008, 32, 32, None, **NO_BIAS, **WINDOW),
        BIASED,
        WHOLE_NORMS,
        GATED,
        POST_NORMS,
        sliding=_every(4),
    ),
    "olmoe": _family(
        _sizes(50304, 2048, 2048, 16, 16, None, num_experts=64, num_experts_per_tok=8, **NO_BIAS),
        BIASED,
        WHOLE_NORMS,
        _experts("gate"),
        NORMS,
        keys=EXPERTS,
        peft_experts="qwen2_moe",
    ),
    "cohere": _family(
        _sizes(256000, 8192, 22528, 40, 64, None, use_qk_norm=False, **TIED, **NO_BIAS),
        BIASED,
        "self_attn.q_norm norm heads d if=use_qk_norm\nself_attn.k_norm norm kv_heads d if=use_qk_norm\n",
        GATED,
        _norms("input_layernorm"),
        parallel="yes",
    ),
    "cohere2": _family(
        _sizes(256000, 8192, 22528, 40, 64, None, **TIED, **NO_BIAS, **WINDOW),
        BIASED,
        GATED,
        _norms("input_layernorm"),
        unread=("head_dim",),
        sliding=_every(4, "sliding_window_pattern"),
        parallel="yes",
    ),
    "granite": _family(
        _sizes(32000, 4096, 11008, 32, 32, None, mlp_bias=False, **NO_BIAS), BIASED, _gated("mlp_bias"), NORMS
    ),
    "granitemoe": _family(
        _sizes(32000, 4096, 11008, 32, 32, None, num_experts=8, num_experts_per_tok=2, **NO_BIAS),
        BIASED,
        _experts("router", "block_sparse_moe"),
        NORMS,
        keys=EXPERTS,
    ),
    "stablelm": _family(
        _sizes(50304, 2560, 6912, 32, 32, 32, use_qkv_bias=False, qk_layernorm=False, use_parallel_residual=False),
        _attention("use_qkv_bias"),
        "self_attn.q_layernorm.norms.% norm d if=qk_layernorm times=heads\n",
        "self_attn.k_layernorm.norms.% norm d if=qk_layernorm times=kv_heads\n",
        GATED,
        _norms("input_layernorm", bias="yes"),
        _norms("post_attention_layernorm", bias="yes", when="!use_parallel_residual"),
        outside=LAYER_NORM_OUTSIDE,
        unread=("head_dim",),
        parallel="use_parallel_residual",
    ),
    "smollm3": _family(
        _sizes(128256, 2048, 11008, 36, 16, 4, mlp_bias=False, use_sliding_window=False, **TIED, **NO_BIAS)
        | {"sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4},
        BIASED,
        _gated("mlp_bias"),
        NORMS,
        sliding=_no_rope,
    ),
    "seed_oss": _family(
        _sizes(155136, 4096, 27648, 64, 80, 8, mlp_bias=False, attention_bias=True, attention_out_bias=False)
        | {"head_dim": 128},
        _attention("attention_bias", "attention_out_bias"),
        _gated("mlp_bias"),
        NORMS,
    ),
    "gpt_oss": _family(
        _sizes(201088, 2880, 2880, 36, 64, 8, num_experts=128, num_experts_per_tok=4, attention_bias=True)
        | {"head_dim": 64, "sliding_window": 128},
        BIASED,
        """
        self_attn.sinks param heads
        mlp.router router e h bias=yes
        mlp.experts.gate_up_proj experts e h 2m
        mlp.experts.gate_up_proj_bias param e 2m
        mlp.experts.down_proj experts e m h
        mlp.experts.down_proj_bias param e h
        """,
        NORMS,
        keys=EXPERTS,
        sliding=_every(2),
    ),
}
