"""What is done to a model's blocks: gathers ahead, and inputs that wait elsewhere (train/blocks.py, offload.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from distft.train import offload
from distft.train.blocks import gather_ahead
from distft.train.offload import offload_block_inputs

BLOCKS, HIDDEN = 4, 16


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of one rank."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def gathers(ahead: bool) -> list[str]:
    """What FSDP2 does in a step, in its order: `forward_prefetch for 1`, `pre_forward 1`, ..."""
    model = llama()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    if ahead:
        gather_ahead(model)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()  # FSDP2 names its units by then
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(input_ids=ids, labels=ids).loss.backward()
    events = sorted(found.events(), key=lambda event: event.time_range.start)
    steps = (re.match(r"FSDP::(\w+_prefetch for |pre_\w+ \()model.layers.(\d)", event.name) for event in events)
    return [f"{step[1].rstrip(' (')} {step[2]}" for step in steps if step]


@pytest.mark.usefixtures("alone")
def test_the_next_block_is_asked_for_before_this_one_computes() -> None:
    plain, ahead = gathers(False), gathers(True)
    assert plain[:4] == [f"pre_forward {block}" for block in range(BLOCKS)]
    forward = [f"{what} {block}" for block in range(1, BLOCKS) for what in ("forward_prefetch for", "pre_forward")]
    assert ahead[: 1 + len(forward)] == ["pre_forward 0", *forward]
    backward = [f"{what} {block}" for block in (3, 2, 1, 0) for what in ("backward_prefetch for", "pre_backward")]
    assert plain[4:] == ahead[1 + len(forward) :] == backward


def test_inputs_of_blocks_wait_elsewhere_and_come_back() -> None:
    """Each block's input goes, once, and nothing else; the gradients are those of a step that keeps all."""
    gone: list[torch.Size] = []
    back: list[torch.Size] = []

    def go(tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
        gone.append(tensor.shape)
        return tensor.shape, tensor.detach().clone()

    def come(found: tuple[Any, torch.Tensor]) -> torch.Tensor:
        back.append(found[0])
        return found[1]

    gradients = []
    ids = torch.arange(24).reshape(2, 12)
    for offloads in (False, True):
        model = llama()
        model.train()
        if offloads:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert offload_block_inputs(model, partial(saved_tensors_hooks, go, come))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gone == back == [torch.Size((2, 12, HIDDEN))] * BLOCKS


def test_a_model_without_checkpoints_offloads_nothing() -> None:
    assert not offload_block_inputs(llama())


def test_what_blocks_share_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 passes its mask like the hidden states."""
    moved: list[torch.Size] = []

    class Host(saved_tensors_hooks):
        def __init__(self, pin_memory: bool):
            super().__init__(lambda t: (moved.append(t.shape), t), lambda found: found[1])

    monkeypatch.setattr(offload, "save_on_cpu", Host)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=HIDDEN, n_head=2, n_layer=2, n_positions=16))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert offload.offload_block_inputs(model)
    ids = torch.arange(24).reshape(2, 12)
    model(input_ids=ids, attention_mask=torch.ones_like(ids).tril(6), labels=ids).loss.backward()
    assert moved == [torch.Size((2, 12, HIDDEN))] * 2
