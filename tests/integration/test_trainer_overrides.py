"""trainer.overrides: what the rules let through trains, and acts."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import launch
from tiny import Tiny

OVERRIDES = {
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 2},
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 1.0,
    "logging_steps": 2,
    "logging_first_step": True,
    "log_level": "info",
    "log_level_replica": "error",
    "log_on_each_node": False,
    "disable_tqdm": False,
    "run_name": "x",
    "project": "y",
    "include_num_input_tokens_seen": True,
    "skip_memory_metrics": True,
    "debug": "underflow_overflow",
    "dataloader_num_workers": 1,
    "dataloader_prefetch_factor": 2,
    "dataloader_persistent_workers": True,
    "dataloader_pin_memory": False,
    "accelerator_config": {"non_blocking": True},
    "torch_empty_cache_steps": 1,
    "ddp_timeout": 600,
    "ddp_find_unused_parameters": False,
    "ddp_bucket_cap_mb": 10,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": False,
    "full_determinism": True,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "per_device_eval_batch_size": 2,
}


def test_all_at_once(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(training__max_steps=6, data__eval=str(tiny.path / "heldout.jsonl"))
    result = launch(recipe | {"trainer": {"overrides": OVERRIDES}}, tmp_path, ranks=2)
    assert result.column("step") == [1, 2, 4, 6]
    assert result.column("learning_rate") == pytest.approx([1 / 300, 2 / 300, 0.01, 0.005])
    assert result.status["ran"]["optimizer"] == "torch SGD"
    assert result.status["eval_loss_after"] < result.status["eval_loss_before"]
