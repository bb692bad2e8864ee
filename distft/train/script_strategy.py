"""What wraps the models of a user's script, compared with the plan while the script runs.

The script takes its strategy from the environment, through accelerate. One that makes its own arrangements, or starts
processes itself, would train otherwise than planned, and often each rank a lone copy, with nobody told.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from distft.errors import RunError
from distft.strategies.kinds import KINDS
from distft.train.imports import AfterImport
from distft.train.status import StatusWriter

# What wraps a model in a script without accelerate, by the module of the class; fully_shard is a function.
WRAPPERS = {
    "torch.nn.parallel.distributed": "DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel": "FullyShardedDataParallel",
    "deepspeed.runtime.engine": "DeepSpeedEngine",
}
# What starts processes itself.
LAUNCHERS = {
    "accelerate.commands.launch": ("launch_command", "accelerate launch"),
    "torch.distributed.run": ("run", "torchrun"),
    "deepspeed.launcher.runner": ("main", "deepspeed"),
}


class ScriptStrategy:
    """Watches what a rank's script does with accelerate, torch, DeepSpeed and transformers' Trainer."""

    def __init__(self, plan: dict[str, Any], status: StatusWriter):
        self.plan, self.status = plan, status
        self.strategy, self.world = plan["strategy"], plan["topology"]["world_size"]
        self.has_accelerator = False
        self.ran: dict[str, Any] | None = None  # of a model that an Accelerator wrapped, else of another one

    def watch(self, imports: AfterImport) -> None:
        """Look at what the script uses, as soon as it imports it."""
        imports.add("accelerate.accelerator", self._watch_accelerate)
        for name, wrapper in WRAPPERS.items():
            imports.add(name, functools.partial(self._watch_wrapper, name=wrapper))
        imports.add("torch.distributed.fsdp", self._watch_fully_shard)
        imports.add("transformers.trainer_callback", self._watch_steps)
        if KINDS[self.strategy].engine == "deepspeed":
            from distft.train import script_clipping

            script_clipping.watch_torch()  # imports torch, as DeepSpeed's ranks do next anyway (cpu_ranks)
            imports.add("accelerate.utils.deepspeed", script_clipping.watch_engine)
        for module, (function, name) in LAUNCHERS.items():
            imports.add(module, functools.partial(_refuse_launcher, function=function, name=name))

    def missed(self) -> str | None:
        """Once the script is done: why the plan may not have taken effect; None where it did."""
        if self.ran is not None:
            from distft.train import strategy_check

            problem = strategy_check.mismatch(self.plan, self.ran)
            return problem and f"{problem}: the script made no Accelerator, but its own arrangements"
        if not self.has_accelerator:
            self._nothing_wrapped()
        if self.strategy == "ddp" and self.world == 1:
            return None
        what = "gave its Accelerator no model to train" if self.has_accelerator else "made no Accelerator"
        return (
            f"the plan is {self.strategy} on {self.world} rank{'s' * (self.world > 1)}, but the script {what}: unless "
            "it has its own way to shard or to average, each rank ran alone"
        )

    def _watch_accelerate(self, module: Any) -> None:
        from distft.train.blocks import sharding_blocks

        kind = module.Accelerator
        make, prepare = kind.__init__, sharding_blocks(kind.prepare)

        @functools.wraps(make)
        def init(accelerator: Any, *args: Any, **kwargs: Any) -> None:
            make(accelerator, *args, **kwargs)
            self.has_accelerator = True
            if accelerator.num_processes != self.world:
                raise RunError(
                    f"the plan is {self.strategy} on {self.world} ranks, and the script's Accelerator sees "
                    f"{accelerator.num_processes}: each would train alone"
                )
            if self.ran is None:
                self._nothing_wrapped()

        @functools.wraps(prepare)
        def prepare_and_check(accelerator: Any, *args: Any, **kwargs: Any) -> Any:
            result = prepare(accelerator, *args, **kwargs)
            self._check(result if isinstance(result, (tuple, list)) else [result])  # FSDP2's is a list
            return result

        kind.__init__, kind.prepare = init, prepare_and_check
        if KINDS[self.strategy].engine == "deepspeed":
            from distft.train import script_clipping

            script_clipping.watch_accelerator(kind)

    def _check(self, objects: Sequence[Any]) -> None:
        """Compare with the plan what wraps the model of the script that is trained."""
        from torch.optim import Optimizer

        from distft.train import strategy_check

        optimizer = next((found for found in objects if isinstance(found, Optimizer)), None)
        for model in _models(objects):
            if not any(parameter.requires_grad for parameter in model.parameters()):
                continue  # accelerate leaves it as it is under ddp: there is nothing to reduce
            ran = strategy_check.describe(model, optimizer)
            self._found(ran)
            if problem := strategy_check.mismatch(self.plan, ran):
                raise RunError(
                    f"{problem}: the script brings a configuration of its own (--deepspeed, --fsdp, a plugin of "
                    f"accelerate's)\nLeave that out, or plan what it does: --set parallelism.strategy={ran['kind']}"
                )

    def _found(self, ran: dict[str, Any]) -> None:
        self.ran = ran
        self.status.update(ran=ran)

    def _nothing_wrapped(self) -> None:
        """Say so in status.json, with what is known: a model may be wrapped later, or never."""
        dist, group = sys.modules.get("torch.distributed"), {}  # a script may need no torch
        if dist and dist.is_initialized():
            group = {"world_size": dist.get_world_size(), "backend": dist.get_backend()}
        self.status.update(ran={"wrapped": None, "kind": "single", "world_size": 1, "backend": None} | group)

    def _watch_wrapper(self, module: Any, name: str) -> None:
        """A script without an Accelerator that wraps its model itself."""
        kind = getattr(module, name)
        make = kind.__init__

        @functools.wraps(make)
        def init(wrapped: Any, *args: Any, **kwargs: Any) -> None:
            make(wrapped, *args, **kwargs)
            self._wrapped(wrapped)

        kind.__init__ = init

    def _watch_fully_shard(self, module: Any) -> None:
        """The same with FSDP2. A script calls it block by block, and at last for the model."""
        shard = module.fully_shard

        @functools.wraps(shard)
        def fully_shard(wrapped: Any, *args: Any, **kwargs: Any) -> Any:
            result = shard(wrapped, *args, **kwargs)
            if not isinstance(wrapped, (list, tuple)):
                self._wrapped(wrapped)
            return result

        module.fully_shard = fully_shard

    def _wrapped(self, model: Any) -> None:
        from distft.train import strategy_check

        if not self.has_accelerator:
            self._found(strategy_check.describe(model))

    def _watch_steps(self, module: Any) -> None:
        """Trainer's steps, for those who follow the run."""
        kind = module.CallbackHandler
        call: Callable[..., Any] = kind.call_event

        @functools.wraps(call)
        def call_event(handler: Any, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if event in ("on_train_begin", "on_train_end"):
                self.status.update(step=state.global_step, max_steps=state.max_steps)
            elif event == "on_step_end":
                self.status.step(state.global_step)
            return call(handler, event, args, state, control, **kwargs)

        kind.call_event = call_event


def _models(objects: Sequence[Any]) -> list[Any]:
    from torch import nn

    return [found for found in objects if isinstance(found, nn.Module)]


def _refuse_launcher(module: Any, function: str, name: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RunError(
            f"the script calls {name}, which starts processes for each of the ranks that distft has started\n"
            "Give distft the training script itself: distft launch ... -- SCRIPT.py ARGS, or -- -m MODULE ARGS"
        )

    setattr(module, function, refuse)
