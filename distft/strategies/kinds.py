"""What a strategy is: one table, for every room to ask.

Only the standard library is imported here, so that both the command line and the ranks can afford it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["ddp", "deepspeed", "fsdp2"]

# What the ranks compute in; simulation/fake_model.py, build, has the details.
# autocast: trained parameters are float32, and torch.autocast casts on the way.
# zero: DeepSpeed casts the whole module to the compute dtype; no autocast.
# fsdp: FSDP2 gathers every parameter in the compute dtype, with autocast on as well (accelerate).
DtypeRegime = Literal["autocast", "zero", "fsdp"]


@dataclass(frozen=True)
class Kind:
    """A strategy: what wraps the model, and which states each rank keeps only a shard of."""

    name: str
    engine: Engine  # torch's DistributedDataParallel, DeepSpeed, or torch's fully_shard
    dtype_regime: DtypeRegime
    zero_stage: int | None = None  # DeepSpeed's
    shards_optimizer: bool = False
    shards_gradients: bool = False
    shards_parameters: bool = False
    in_groups: bool = False  # shards within groups of ranks, replicates across them
    offloads: tuple[str, ...] = ()  # what parallelism.offload can be besides none
    min_ranks: int = 1  # with fewer there is nothing to shard

    def shards_a_made_model(self, quantized: bool) -> bool:
        """Whether it shards a model that was made before; zero.Init shards while it makes one, unless quantized."""
        return self.engine == "fsdp2" or (self.zero_stage == 3 and quantized)

    def regime(self, is_pure_bf16: bool) -> DtypeRegime:
        """What the ranks compute in; a model that is bf16 by itself needs no autocast."""
        return "zero" if is_pure_bf16 else self.dtype_regime

    @property
    def replicates(self) -> bool:
        """Whether every rank keeps all states complete."""
        return not (self.shards_optimizer or self.shards_gradients or self.shards_parameters)


def _zero(stage: int, *offloads: str) -> Kind:
    """ZeRO (arXiv 1910.02054). It also runs on one rank, which is useful with offload."""
    return Kind(
        f"zero{stage}",
        "deepspeed",
        "zero",
        zero_stage=stage,
        shards_optimizer=True,
        shards_gradients=stage >= 2,
        shards_parameters=stage >= 3,
        offloads=offloads,
    )


def _fsdp(name: str, min_ranks: int, in_groups: bool = False) -> Kind:
    """FSDP2 offloads parameters, gradients and optimizer states together or not at all (CPUOffloadPolicy)."""
    return Kind(
        name,
        "fsdp2",
        "fsdp",
        shards_optimizer=True,
        shards_gradients=True,
        shards_parameters=True,
        in_groups=in_groups,
        offloads=("all",),
        min_ranks=min_ranks,
    )


# In the order in which docs and messages list them. config/recipe.py, Strategy, has the same names for pydantic.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("ddp", "ddp", "autocast"),
        _zero(1, "optimizer"),
        _zero(2, "optimizer"),
        _zero(3, "optimizer", "all"),  # offload_param needs stage 3
        _fsdp("fsdp", min_ranks=2),
        _fsdp("hsdp", min_ranks=4, in_groups=True),  # two groups of two
    )
}


def that_offload(offload: str) -> list[str]:
    """Names of the strategies under which parallelism.offload can be this."""
    return [kind.name for kind in KINDS.values() if offload in ("none", *kind.offloads)]
