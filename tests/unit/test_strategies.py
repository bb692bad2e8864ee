"""distft.strategies, checked with DeepSpeed's, accelerate's and transformers' own code: they read every key."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import reference_files
import yaml

from distft.config.batch import Batch
from distft.config.recipe import Recipe, Strategy
from distft.hardware.topology import Topology
from distft.planner.search import CANDIDATES
from distft.strategies import merge
from distft.strategies.accelerate import accelerate_config, accelerate_environment, fsdp_config
from distft.strategies.deepspeed import LARGEST_BUCKET, SMALLEST_BUCKET, bucket_size, deepspeed_config, portable_config
from distft.strategies.kinds import KINDS, that_offload

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")

import accelerate.commands.launch as accelerate_launch
from accelerate import ParallelismConfig
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from deepspeed.runtime import config as ds_config_module
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from pydantic import ValidationError
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

ROOT = Path(__file__).parents[2]
OFFLOADS = {"zero1": ("none", "optimizer"), "zero2": ("none", "optimizer"), "zero3": ("none", "optimizer", "all")}
STRATEGIES = [(strategy, offload) for strategy, offloads in OFFLOADS.items() for offload in offloads]
LORA, FULL, TINY = 41_943_040, 8_030_261_248, 1_000_000  # trained parameters: of an adapter, an 8B model, a toy
WIDTHS = [(1, Batch(32, 2, 16)), (8, Batch(32, 4, 1)), (48, Batch(96, 1, 2))]  # world size, batch


def recipe(**groups) -> Recipe:
    return Recipe.model_validate({"name": "x", "model": {"name_or_path": "m"}, "data": {"train": "d"}, **groups})


def test_the_table_of_strategies() -> None:
    assert tuple(KINDS) == get_args(Strategy)
    assert [kind.name for kind in KINDS.values()] == list(KINDS)
    # How many of optimizer states, gradients and parameters are sharded, in this order.
    sharded = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3, "hsdp": 3}
    for name, kind in KINDS.items():
        parts = (kind.shards_optimizer, kind.shards_gradients, kind.shards_parameters)
        assert (sum(parts), list(parts)) == (sharded[name], sorted(parts, reverse=True))
        assert kind.replicates is (name == "ddp")
        assert (kind.engine == "deepspeed") is (kind.zero_stage is not None) is (kind.dtype_regime == "zero")
    assert that_offload("none") == list(KINDS)
    assert that_offload("optimizer") == ["zero1", "zero2", "zero3"]
    assert that_offload("all") == ["zero3", "fsdp", "hsdp"]
    # The planner tries only what exists.
    assert all(offload in ("none", *KINDS[name].offloads) for name, offload in CANDIDATES)
    assert {name for name, _ in CANDIDATES} == set(KINDS)


def run_config(strategy="zero2", offload="none", world_size=8, device_type="cuda", trainable=FULL, **groups) -> dict:
    return deepspeed_config(
        strategy=strategy,
        offload=offload,
        world_size=world_size,
        device_type=device_type,
        recipe=recipe(**groups),
        batch=Batch(4 * world_size, 2, 2),
        trainable_parameters=trainable,
    )


def leaves(config: dict, prefix: str = "") -> dict:
    """Dotted path → value."""
    found = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


class Recorder(dict):
    """A dict that records which of its keys were read."""

    def __init__(self, values: dict):
        super().__init__({k: Recorder(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.read: set[str] = set()

    def __copy__(self):
        return self  # DeepSpeedConfig reads a copy

    def __contains__(self, key):
        self.read.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def unread(self) -> set[str]:
        """Dotted paths that nobody read. Sections that DeepSpeed passes to pydantic as a whole are left to pydantic."""
        nested = {
            f"{k}.{path}" for k in ("data_types", "torch_autocast") if k in self.keys() for path in self[k].unread()
        }
        return (set(self) - self.read) | nested


def deepspeed_reads(config: dict, world_size: int, monkeypatch) -> tuple[ds_config_module.DeepSpeedConfig, set[str]]:
    """DeepSpeed's view of a config at this world size, and the keys that it never read."""
    monkeypatch.setattr(ds_config_module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ds_config_module.dist, "get_world_size", lambda *_: world_size)
    recorder = Recorder(config)
    parsed = ds_config_module.DeepSpeedConfig(recorder)
    # 0.19.4 and 0.19.5 always average, and have no key for it
    silent = set() if hasattr(ds_config_module, "get_gradient_allreduce_op") else {"gradient_allreduce_op"}
    return parsed, recorder.unread() - silent


def test_checker_finds_made_up_keys(monkeypatch):
    config = run_config()
    assert deepspeed_reads(config, 8, monkeypatch)[1] == set()
    assert deepspeed_reads({**config, "zero_allow_untested_optimiser": True}, 8, monkeypatch)[1] == {
        "zero_allow_untested_optimiser"
    }
    typo = merge(config, {"data_types": {"grad_acum_dtype": "fp32"}})
    assert deepspeed_reads(typo, 8, monkeypatch)[1] == {"data_types.grad_acum_dtype"}
    for section in ("zero_optimization", "bf16", "fp16"):
        with pytest.raises(ValidationError, match="made_up"):
            deepspeed_reads(merge(config, {section: {"made_up": 1}}), 8, monkeypatch)
    with pytest.raises(ValidationError, match="made_up"):
        deepspeed_reads(merge(config, {"zero_optimization": {"offload_optimizer": {"made_up": 1}}}), 8, monkeypatch)


@pytest.mark.parametrize("strategy, offload", STRATEGIES)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("trainable", [LORA, FULL, TINY], ids=["lora", "full", "tiny"])
def test_run_config_over_the_whole_matrix(strategy, offload, precision, trainable, monkeypatch):
    training = {"mixed_precision": precision, "max_grad_norm": 0.7}
    for (world_size, batch), device_type in product(WIDTHS, ("cuda", "cpu")):
        config = deepspeed_config(
            strategy=strategy,
            offload=offload,
            world_size=world_size,
            device_type=device_type,
            recipe=recipe(training=training),
            batch=batch,
            trainable_parameters=trainable,
        )
        assert "auto" not in leaves(config).values()
        assert json.loads(json.dumps(config)) == config
        assert not {"optimizer", "scheduler"} & set(config)

        parsed, unread = deepspeed_reads(config, world_size, monkeypatch)  # raises if the batches do not multiply
        assert unread == set()
        assert parsed.train_batch_size == batch.global_batch_size
        assert parsed.train_micro_batch_size_per_gpu == batch.micro_batch_size
        assert parsed.gradient_accumulation_steps == batch.gradient_accumulation_steps
        assert parsed.gradient_clipping == 0.7
        assert parsed.bfloat16_config.enabled == (precision == "bf16")
        assert parsed.float16_config.enabled == (precision == "fp16")
        assert parsed.grad_accum_dtype == "fp32" and str(parsed.communication_data_type) == "torch.float32"
        assert parsed.zero_allow_untested_optimizer and not parsed.zero_force_ds_cpu_optimizer

        zero = config["zero_optimization"]
        assert zero["stage"] == int(strategy[-1]) == parsed.zero_optimization_stage
        assert leaves(zero) == {k: v for k, v in leaves(dump(parsed.zero_config)).items() if k in leaves(zero)}
        assert config["bf16"] == parsed.bfloat16_config.model_dump()
        assert config["fp16"] == parsed.float16_config.model_dump()
        assert (zero["offload_optimizer"]["device"] == "cpu") == (offload != "none")
        assert (zero.get("offload_param", {}).get("device") == "cpu") == (offload == "all")
        pinned = {v for k, v in leaves(zero).items() if k.endswith("pin_memory")}
        assert (True in pinned) == (device_type == "cuda" and offload != "none")


def dump(zero: DeepSpeedZeroConfig) -> dict:
    return zero.model_dump(by_alias=True, mode="json")


# What a run's config leaves to its default, and why. Everything else that DeepSpeedZeroConfig knows is written out.
NEWER = "deepspeed 0.19.4, the oldest allowed, ends at an unknown key"
REMOVED = "gone from 0.19.8: it ends at an unknown key"
OTHER_STAGES = "this stage does not read it"
LEFT_OUT = {
    "cpu_offload": "deprecated",
    "cpu_offload_param": "deprecated",
    "cpu_offload_use_pin_memory": "deprecated",
    "stage3_gather_fp16_weights_on_model_save": "deprecated",
    "legacy_stage1": "removed: true ends the run",
    "elastic_checkpoint": "of DeepSpeed's own checkpoints, no longer supported",
    "pipeline_loading_checkpoint": "pipeline parallelism",
    "zenflow": "absent means off",
    "leaf_module": "for mixtures of experts: the model's own",
    "log_trace_cache_warnings": "diagnostics",
    "enable_sanity_checks": "diagnostics",
    "save_muon_momentum_buffer_in_memory": "Muon",
    "mics_shard_size": REMOVED,
    "mics_hierarchical_params_gather": REMOVED,
    "zeropp_loco_param": REMOVED,
    "compute_grad_norm": NEWER,
    "parameter_alignment": NEWER,
}
LEFT_OUT_OF_STAGE_3 = dict.fromkeys(
    [
        "allgather_partitions",
        "allgather_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "round_robin_gradients",
        "ignore_unused_parameters",
        "load_from_fp32_weights",
    ],
    OTHER_STAGES,
)
LEFT_OUT_OF_STAGES_1_2 = dict.fromkeys(
    [
        "offload_param",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "memory_efficient_linear",
        "override_module_apply",
    ],
    OTHER_STAGES,
)
NVME = "NVMe only"
OFFLOAD_LEFT_OUT = {
    "nvme_path": NVME,
    "buffer_count": NVME,
    "buffer_size": NVME,
    "max_in_cpu": NVME,
    "pipeline_read": NVME,
    "pipeline_write": NVME,
    "fast_init": NVME,
    "cpuadam_cores_perc": "super_offload only",
}


def names(model: type) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize("strategy, offload", STRATEGIES)
def test_every_field_is_written_out_or_left_out_on_purpose(strategy, offload):
    for config in (run_config(strategy, offload), portable_config(strategy=strategy, offload=offload)):
        zero = config["zero_optimization"]
        left_out = LEFT_OUT | (LEFT_OUT_OF_STAGE_3 if strategy == "zero3" else LEFT_OUT_OF_STAGES_1_2)
        assert names(DeepSpeedZeroConfig) - set(zero) <= set(left_out)
        assert not set(zero) - names(DeepSpeedZeroConfig)
        assert config["zero_force_ds_cpu_optimizer"] is False and config["zero_allow_untested_optimizer"] is True
        assert set(config["bf16"]) == names(DeepSpeedBF16Config)
        assert set(config["fp16"]) == names(DeepSpeedFP16Config)
        missing = names(DeepSpeedZeroOffloadOptimizerConfig) - set(zero["offload_optimizer"])
        if "offload_param" in zero:
            missing |= names(DeepSpeedZeroOffloadParamConfig) - set(zero["offload_param"])
        assert missing <= set(OFFLOAD_LEFT_OUT)


def test_buckets_are_sized_to_what_is_trained():
    assert bucket_size(0) == SMALLEST_BUCKET == bucket_size(1_000_000)
    assert bucket_size(41_943_040) == 11_000_000
    assert bucket_size(8_030_261_248) == LARGEST_BUCKET
    for trained in (1, 3_999_999, 4_000_001, 20_000_000, 10**12):
        assert bucket_size(trained) % 2 == 0  # stage_1_and_2.py: a multiple of nccl_start_alignment_factor
    zero = run_config("zero2", trainable=LORA)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 11_000_000


@pytest.mark.parametrize("strategy, offload", [("zero1", "all"), ("zero2", "all"), ("zero3", "params")])
def test_what_a_stage_cannot_offload(strategy, offload):
    with pytest.raises(ValueError, match=f"cannot offload '{offload}'"):
        run_config(strategy, offload)


def test_overrides_lie_on_top_and_deep():
    zero = {"reduce_bucket_size": 7, "offload_optimizer": {"ratio": 0.5}}
    overrides = {"zero_optimization": zero, "optimizer": {"type": "Lion"}, "gradient_clipping": 3}
    before = copy.deepcopy(overrides)
    changed, plain = run_config("zero3", deepspeed={"overrides": overrides}), run_config("zero3")
    assert leaves(changed) == leaves(plain) | leaves(overrides)
    assert overrides == before


def test_merge():
    base = {"a": {"b": 1, "c": [1]}, "d": 1}
    assert merge(base, {"a": {"b": 2}, "d": {"e": 3}}) == {"a": {"b": 2, "c": [1]}, "d": {"e": 3}}
    assert merge(base, {"a": None}) == {"a": None, "d": 1}
    merged = merge(base, {})
    merged["a"]["c"].append(2)
    assert base == {"a": {"b": 1, "c": [1]}, "d": 1}


# --- the portable form -----------------------------------------------------------------------------------------------


def trainer_arguments(**more) -> SimpleNamespace:
    """What HfTrainerDeepSpeedConfig reads from TrainingArguments, without starting a process group."""
    values = {
        "world_size": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.1,
        "save_on_each_node": False,
        "fp16": False,
        "fp16_full_eval": False,
        "bf16": True,
        "bf16_full_eval": False,
        "get_warmup_steps": lambda steps: 3,
    }
    return SimpleNamespace(**values | more)


@pytest.mark.parametrize("strategy, offload", STRATEGIES)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
def test_trainer_fills_the_portable_form(strategy, offload, precision, monkeypatch):
    filled = HfTrainerDeepSpeedConfig(portable_config(strategy=strategy, offload=offload))
    arguments = trainer_arguments(bf16=precision == "bf16", fp16=precision == "fp16")
    filled.trainer_config_process(arguments)
    no_sizes = SimpleNamespace(config=SimpleNamespace())  # "auto" buckets would need config.hidden_size
    filled.trainer_config_finalize(arguments, no_sizes, num_training_steps=10)
    assert "auto" not in leaves(filled.config).values()
    parsed, unread = deepspeed_reads(filled.config, 8, monkeypatch)
    assert unread == set()
    assert (parsed.train_batch_size, parsed.gradient_accumulation_steps) == (64, 4)
    assert parsed.gradient_clipping == 0.5
    assert parsed.bfloat16_config.enabled == (precision == "bf16")


@pytest.mark.parametrize("strategy, offload", STRATEGIES)
def test_trainer_agrees_with_a_run_config(strategy, offload):
    """TrainingArguments made from the same recipe do not contradict the file, which transformers would refuse."""
    config = run_config(strategy, offload, training={"max_grad_norm": 0.5})
    filled = HfTrainerDeepSpeedConfig(config)
    arguments = trainer_arguments(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    filled.trainer_config_process(arguments)
    filled.trainer_config_finalize(arguments, SimpleNamespace(config=SimpleNamespace()), num_training_steps=10)
    assert filled.config == config


# --- accelerate ------------------------------------------------------------------------------------------------------

TOPOLOGIES = [Topology(1, 1), Topology(1, 8), Topology(4, 8)]
# Set by the launcher but not by distft, each to the default that accelerate uses without it.
LAUNCHER_ONLY = {
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    # FSDP1's; FSDP2 reads none of them (the plugins are compared below)
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    # of other wrapping policies, and of accelerate's own checkpointing
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}
OURS = re.compile("ACCELERATE_|FSDP_|PARALLELISM_CONFIG_")


def launch_config(strategy, topology, offload="none", device_type="cuda", **more) -> dict:
    """accelerate.yaml of a bf16 run; hsdp shards within a machine."""
    return accelerate_config(
        strategy=strategy,
        offload=offload,
        topology=topology,
        mixed_precision="bf16",
        device_type=device_type,
        **{"shard_size": topology.nproc_per_node} | more,
    )


def launcher_environment(config: dict, folder: Path, monkeypatch, *options: str) -> dict[str, str]:
    """The variables that `accelerate launch --config_file FILE` gives its ranks, by its own parser and code."""
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    for name in [name for name in os.environ if OURS.match(name)]:
        monkeypatch.delenv(name)
    caught: list[dict] = []
    deepspeed, multi_gpu, simple = prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
    monkeypatch.setattr(accelerate_launch, "deepspeed_launcher", lambda args: caught.append(deepspeed(args)[1]))
    monkeypatch.setattr(accelerate_launch, "multi_gpu_launcher", lambda args: caught.append(multi_gpu(args)))
    monkeypatch.setattr(accelerate_launch, "simple_launcher", lambda args: caught.append(simple(args)[1]))
    argv = ["--config_file", str(file), "--main_process_port", "0", "--main_process_ip", "127.0.0.1", *options, "s.py"]
    accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(argv))
    (env,) = caught
    return {name: value for name, value in env.items() if OURS.match(name)}


def cases():
    for strategy, topology, device_type in product(
        ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"), TOPOLOGIES, ("cuda", "cpu")
    ):
        if strategy == "hsdp" and topology.nnodes == 1:
            continue
        for offload in {"fsdp": ("none", "all"), "hsdp": ("none", "all")}.get(strategy, ("none",)):
            yield pytest.param(
                strategy, topology, device_type, offload, id=f"{strategy}-{topology.world_size}-{device_type}-{offload}"
            )


@pytest.mark.parametrize("strategy, topology, device_type, offload", list(cases()))
def test_environment_is_what_accelerate_launch_sets(strategy, topology, device_type, offload, tmp_path, monkeypatch):
    config = launch_config(strategy, topology, offload, device_type, ds_config_file="/runs/x/ds_config.json")
    theirs = launcher_environment(config, tmp_path, monkeypatch)
    ours = accelerate_environment(config)
    if strategy in ("fsdp", "hsdp") and device_type == "cpu":
        # The launcher leaves it out, and CPU ranks would then train separately.
        assert "ACCELERATE_USE_CPU" not in theirs
        assert ours.pop("ACCELERATE_USE_CPU") == "True"
    assert ours == {name: value for name, value in theirs.items() if LAUNCHER_ONLY.get(name) != value}

    assert ours["ACCELERATE_MIXED_PRECISION"] == ("no" if strategy.startswith("zero") else "bf16")
    with patch_environment(**ours):
        mesh = ParallelismConfig()
    if strategy == "hsdp":
        assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (topology.nnodes, topology.nproc_per_node)
        assert mesh.total_size == topology.world_size
    else:
        assert mesh.total_size == 1 and "ACCELERATE_USE_PARALLELISM_CONFIG" not in ours


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_precision_of_a_script_under_zero(strategy, tmp_path, monkeypatch):
    """Only the command line can pass it; in the YAML it makes the script fail."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(portable_config(strategy=strategy, offload="none")))
    config = launch_config(strategy, Topology(1, 2), ds_config_file=str(path))
    assert "mixed_precision" not in config
    theirs = launcher_environment(config, tmp_path, monkeypatch, "--mixed_precision", "bf16")
    ours = accelerate_environment(config, mixed_precision="bf16")
    assert ours == {name: value for name, value in theirs.items() if LAUNCHER_ONLY.get(name) != value}

    refused = launcher_environment({**config, "mixed_precision": "bf16"}, tmp_path, monkeypatch)
    with patch_environment(**refused), pytest.raises(ValueError, match="will be ignored"):
        DeepSpeedPlugin()


@pytest.mark.parametrize("strategy, offload", STRATEGIES)
def test_deepspeed_plugin_takes_a_run_config_as_it_is(strategy, offload, tmp_path):
    path, config = tmp_path / "ds_config.json", run_config(strategy, offload)
    path.write_text(json.dumps(config))
    wrapped = launch_config(strategy, Topology(1, 8), offload, ds_config_file=str(path))
    with patch_environment(**accelerate_environment(wrapped)):
        plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    assert plugin.zero3_init_flag == (strategy == "zero3")
    assert plugin.deepspeed_config == config | {"steps_per_print": float("inf")}


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_fsdp_plugin_is_the_launchers(strategy, tmp_path, monkeypatch):
    """What distft leaves out of the environment changes nothing: both make the same plugin."""
    overrides = {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "reshard_after_forward": False}
    config = launch_config(strategy, Topology(2, 2), overrides=overrides)
    assert config["fsdp_config"]["fsdp_version"] == 2
    plugins = []
    for env in (accelerate_environment(config), launcher_environment(config, tmp_path, monkeypatch)):
        with patch_environment(**env):
            plugins.append(FullyShardedDataParallelPlugin())
    ours, theirs = (vars(plugin) for plugin in plugins)
    policies = ("cpu_offload", "state_dict_config", "optim_state_dict_config")  # objects without equality
    assert {k: v for k, v in ours.items() if k not in policies} == {
        k: v for k, v in theirs.items() if k not in policies
    }
    assert [str(ours[k]) for k in policies] == [str(theirs[k]) for k in policies]
    assert ours["transformer_cls_names_to_wrap"] == ["LlamaDecoderLayer"]
    assert ours["fsdp_version"] == 2 and ours["cpu_ram_efficient_loading"]


def test_fsdp_config_on_purpose():
    assert fsdp_config(offload="all", device_type="cuda")["fsdp_offload_params"] is True
    for device_type, quantization, alone in (("cuda", None, True), ("cuda", "nf4", False), ("cpu", None, False)):
        section = fsdp_config(offload="none", device_type=device_type, quantization=quantization)
        assert section["fsdp_cpu_ram_efficient_loading"] is alone
    options = accelerate_launch.launch_command_parser().parse_args(["s.py"])
    assert set(section) <= set(
        vars(options)
    )  # launch.py would copy a key that it has no option for, and nobody would read it


@pytest.mark.parametrize(
    "change, message",
    [({"strategy": "zero2"}, "needs ds_config_file"), ({"strategy": "hsdp", "shard_size": 3}, "do not divide 8 ranks")],
)
def test_what_cannot_be_written(change, message):
    with pytest.raises(ValueError, match=message):
        launch_config(**change, topology=Topology(1, 8))


# --- files for people ------------------------------------------------------------------------------------------------


def test_reference_files_are_their_generators():
    found = sorted([*ROOT.glob("ds_configs/*.json"), *ROOT.glob("launch/accelerate/*.yaml")])
    assert len(found) == 5 + 6
    made = {name: text for name, text in reference_files.files(ROOT).items() if not name.startswith("slurm/")}
    assert {str(path.relative_to(ROOT)): path.read_text() for path in found} == made


def test_reference_files_command(tmp_path, capsys):
    assert reference_files.main([str(tmp_path)]) == 0
    assert reference_files.main([str(tmp_path), "--check"]) == 0
    (tmp_path / "ds_configs/zero2.json").write_text("{}")
    (tmp_path / "launch/accelerate/ddp.yaml").unlink()
    assert reference_files.main([str(tmp_path), "--check"]) == 1
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "ds_configs/zero2.json",
        "launch/accelerate/ddp.yaml",
    ]
    assert (tmp_path / "ds_configs/zero2.json").read_text() == "{}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("launch/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_taken_by_accelerate(path, tmp_path, monkeypatch):
    config = yaml.safe_load(path.read_text())
    env = launcher_environment(config, tmp_path, monkeypatch)
    expected = {"ddp": set(), "fsdp": {"ACCELERATE_USE_FSDP"}}.get(path.stem, set())
    expected |= {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"} if path.stem == "hsdp" else set()
    expected |= {"ACCELERATE_USE_DEEPSPEED"} if path.stem.startswith("zero") else set()
    assert {name for name in env if name.startswith("ACCELERATE_USE_")} == expected
    if expected == {"ACCELERATE_USE_DEEPSPEED"}:
        assert (ROOT / env["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).is_file()


def test_readme_gives_a_reason_for_each_field():
    """The table in ds_configs/README.md has a row for every key in the files, and no other rows."""
    used = {path for file in ROOT.glob("ds_configs/*.json") for path in leaves(json.loads(file.read_text()))}
    last = {path.removeprefix("zero_optimization.") for path in used}
    rows = [line for line in (ROOT / "ds_configs/README.md").read_text().splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    assert documented == last


def test_strategies_import_nothing_heavy():
    code = (
        "import sys; sys.path.insert(0, 'tools')\n"
        "import distft.strategies.deepspeed, distft.strategies.accelerate, reference_files\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'accelerate') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_files_say_what_they_need(tmp_path: Path) -> None:
    """accelerate itself says nothing where it trains lone copies."""
    for path in sorted(ROOT.glob("launch/accelerate/*.yaml")):
        assert "# Needs 8 NVIDIA GPUs on each machine. Without, each " in path.read_text()
    (tmp_path / "own.py").write_text("")
    from running import distft

    shown = distft("launch", "--dry-run", "--json", "--gpus-per-node", "2", "--", "own.py", cwd=tmp_path)
    made = json.loads(shown.stdout)["files"]["accelerate.yaml"]
    assert made.startswith("# For CPU processes, which distft alone starts as one job: ")
