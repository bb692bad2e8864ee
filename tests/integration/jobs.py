"""Tunings of a recipe under strategies: the jobs that test_equivalence.py and test_resume.py have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from running import Result
from tiny import Tiny

FP32 = 1e-5
SAVED, STEPS = 2, 4
# kind of `ran` → the class that must wrap the model; {} stands for the model's own class.
WRAPPED = {"ddp": "DistributedDataParallel", "zero": "DeepSpeedEngine", "fsdp": "FSDP{}", "hsdp": "FSDP{}"}
ZERO_OPTIMIZER = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}

FULL = {"lora": None, "training__learning_rate": 0.003}
BF16 = {"training__mixed_precision": "bf16"}
# A ChatML template, whose tokens the tokenizer does not have; <|go|> it has.
NEW = {
    "model__add_tokens": ["<|im_start|>", "<|im_end|>", "<|go|>"],
    "model__eos_token": "<|im_end|>",
    "data__chat_template": "chatml.jinja",
    "data__max_length": 96,
}
PART = {**FULL, "training__train_only": [r"model\.layers\.-1", r"model\.layers\.0\.mlp\.down_proj", "lm_head"]}
# Adapters of several ranks on some layers of some blocks.
SOME_LAYERS = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
    "exclude_modules": ["0.mlp.up_proj", "k_proj"],
    "rank_pattern": {"down_proj": 8, r"layers\.1\.self_attn\..*": 2},
    "alpha_pattern": {"q_proj": 32},
}
WHOLE_LAYERS = {"r": 4, "lora_alpha": 8, "modules_to_save": ["embed_tokens", "model.norm", "lm_head"]}
BOTH_ENDS = {"r": 4, "lora_alpha": 8, "modules_to_save": ["embed_tokens", "lm_head"]}
EMBEDDINGS_TOO = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj", "embed_tokens"],
    "modules_to_save": ["lm_head"],
}
LORAPLUS = {"loraplus_lr_ratio": 4.0, "loraplus_lr_embedding": 0.02}
PISSA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "init_lora_weights": "pissa",
    "rank_pattern": {"up_proj": 2},
    "alpha_pattern": {"down_proj": 3.0},
}
# Solved exactly, with other blocks in some layers, beside a layer that is trained whole.
OFT = {
    "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"],
    "exclude_modules": ["0.mlp.up_proj"],
    "modules_to_save": ["embed_tokens"],
    "oft": {"r": 4, "use_cayley_neumann": False, "block_share": True},
}
COFT = {"coft": True, "eps": 0.5, "oft_block_size": 16, "num_cayley_neumann_terms": 7}
OFTEN = {"update_proj_gap": 2, "scale": 2.0}  # GaLore and APOLLO choose new directions
TUNINGS = {
    "lora": {},
    "full": FULL,
    "full tied": {**FULL, "model__name_or_path": "tied"},
    "part full": PART,
    "part full bf16": {**PART, **BF16},
    "dft": {"training__loss_type": "dft"},
    "eaft": {"training__loss_type": "eaft"},
    "nf4": {"model__quantization": "nf4"},
    "int8": {"model__quantization": "int8"},
    "dora": {"lora": {"r": 4, "use_dora": True}},
    "rslora": {"lora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}},
    "some layers": {"lora": SOME_LAYERS},
    "whole layers": {"lora": WHOLE_LAYERS},
    "whole layers nf4": {"lora": WHOLE_LAYERS, "model__quantization": "nf4"},
    "whole layers new tokens": {**NEW, "lora": BOTH_ENDS},
    "whole layers tied": {"lora": BOTH_ENDS, "model__name_or_path": "tied"},
    "loraplus": {"lora": {**EMBEDDINGS_TOO, **LORAPLUS}},
    "pissa": {"lora": PISSA, "training__learning_rate": 0.05},
    "olora": {"lora": {**PISSA, "init_lora_weights": "olora", "use_rslora": True}, "training__learning_rate": 0.02},
    "pissa bf16": {"lora": PISSA | {"init_lora_weights": "pissa_niter_4"}, "training__learning_rate": 0.02, **BF16},
    "gaussian": {"lora": {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"}},
    "orthogonal": {"lora": {"r": 4, "lora_alpha": 8, "init_lora_weights": "orthogonal"}},
    "oft": {"lora": {"oft": {"oft_block_size": 8}}},
    "oft layers": {"lora": OFT},
    "oft nf4": {"lora": {"oft": {}}, "model__quantization": "nf4"},
    "oft int8": {"lora": {"oft": {}}, "model__quantization": "int8"},
    "oft bf16": {"lora": {"oft": {}}, **BF16},
    "coft": {"lora": {"oft": COFT}},
    "new tokens": NEW,
    "new tokens tied": {**NEW, "model__name_or_path": "tied"},
    "new tokens full": {**NEW, **FULL},
    "new tokens nf4": {**NEW, "model__quantization": "nf4"},
    "unpacked": {"data__packing": False},
    "unpacked full": {"data__packing": False, **FULL},
    "bf16": BF16,
    "bf16 full": {**BF16, **FULL},
    "no masters full bf16": {**BF16, **FULL, "training__master_weights": "none"},
    "no masters part full bf16": {**PART, **BF16, "training__master_weights": "none"},
    "adamw_torch": {"training__optim": "adamw_torch"},
    "adafactor": {"training__optim": "adafactor"},
    "muon full": {**FULL, "training__optim": "muon"},
    "muon full bf16": {**FULL, **BF16, "training__optim": "muon"},
    "galore full": {**FULL, "training__optim": "galore_adamw", "training__optim_args": {"rank": 8, **OFTEN}},
    "apollo full": {**FULL, "training__optim": "apollo_adamw", "training__optim_args": {"rank": 4, **OFTEN}},
    "adamw_bnb_8bit": {"training__optim": "adamw_bnb_8bit"},
    "paged_adamw_8bit": {"training__optim": "paged_adamw_8bit"},
    "paged_adamw_32bit": {"training__optim": "paged_adamw_32bit"},
}
OPTIMIZER = {
    "adamw_torch": "torch AdamW",
    "adafactor": "transformers Adafactor",
    "no masters full bf16": "distft KahanAdamW",
    "no masters part full bf16": "distft KahanAdamW",
    "muon full": "distft Muon",
    "muon full bf16": "distft Muon",
    "galore full": "distft LowRank",
    "apollo full": "distft LowRank",
    "adamw_bnb_8bit": "bitsandbytes AdamW 8-bit",
    "paged_adamw_8bit": "bitsandbytes AdamW 8-bit",
    "paged_adamw_32bit": "bitsandbytes AdamW 32-bit",
}


class Job(NamedTuple):
    """A recipe with a tuning of TUNINGS under a strategy; `changes` must change nothing."""

    strategy: str
    ranks: int
    tuning: str
    changes: Mapping[str, Any] = {}

    def __str__(self) -> str:
        changed = [f"{key.split('__')[1]}={value}" for key, value in self.changes.items()]
        return "-".join([self.tuning.replace(" ", "-"), self.strategy, f"x{self.ranks}", *changed])

    def recipe(self, tiny: Tiny) -> dict[str, Any]:
        """Evaluates before and after, and saves at step SAVED: neither changes what is trained."""
        beside = {"data__eval": str(tiny.path / "heldout.jsonl"), "checkpoint__save_steps": SAVED}
        asked = {"parallelism__strategy": self.strategy, "training__max_steps": STEPS}
        changes = {**TUNINGS[self.tuning], **self.changes}
        for name in ("data__chat_template", "model__name_or_path"):
            if name in changes:
                changes[name] = str(tiny.path / changes[name])
        return tiny.recipe(**beside, **asked, **changes)


def alone(tuning: str) -> Job:
    """The same in one process."""
    return Job("ddp", 1, tuning)


STRATEGIES = [
    ("ddp", 2, {}),
    ("ddp", 4, {}),
    ("zero1", 2, {}),
    ("zero2", 2, {}),
    ("zero2", 2, {"parallelism__offload": "optimizer"}),
    ("zero3", 2, {}),
    ("zero3", 2, {"parallelism__offload": "all"}),
    ("fsdp", 2, {}),
    ("fsdp", 4, {}),
    ("hsdp", 4, {"parallelism__hsdp_shard_size": 2}),
]


def loss_of(job: Job) -> str:
    """How the loss is computed: under ZeRO-3 not in chunks where the output layer has more than its weight."""
    asked: str = job.changes.get("training__loss", "chunked")
    more = job.tuning.startswith(("whole layers", "loraplus", "new tokens", "oft layers")) and "full" not in job.tuning
    return "full" if job.strategy == "zero3" and more else asked


def assert_ran(result: Result, job: Job) -> None:
    ran, strategy = result.status["ran"], job.strategy
    assert ran["kind"] == strategy
    model_class = "LlamaForCausalLM" if "full" in job.tuning else "PeftModelForCausalLM"
    assert ran["wrapped"] == WRAPPED[strategy.rstrip("123")].format(model_class)
    assert (ran["world_size"], ran["backend"]) == (job.ranks, "gloo")
    assert ran["loss"] == loss_of(job)
    by_unit = strategy in ("fsdp", "hsdp") or (strategy == "zero3" and "nf4" in job.tuning)
    starts_from_base = job.tuning.split()[0] in ("dora", "pissa", "olora")
    assert ran["loading"] == ("by unit" if by_unit and not starts_from_base else "from_pretrained")
    assert ran["attention"] == job.changes.get("model__attn_implementation", "sdpa")
    assert ran["gradient_checkpointing"] is job.changes.get("training__gradient_checkpointing", False)
    if job.tuning in OPTIMIZER:
        assert ran["optimizer"] == OPTIMIZER[job.tuning]
    if strategy.startswith("zero"):
        assert ran["zero_optimizer"] == ZERO_OPTIMIZER[int(strategy[-1])]
    if strategy == "fsdp":
        assert ran["mesh"] == [job.ranks]
    if strategy == "hsdp":
        assert ran["mesh"] == [2, 2]
    if strategy in ("fsdp", "hsdp"):
        assert ran["units"]["FSDPLlamaDecoderLayer"] == 2
        assert ran["reshard_after_forward"] is ("fsdp__overrides" not in job.changes)
        assert ran["gathers_ahead"] == 1  # the first of two blocks
