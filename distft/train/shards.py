"""What this rank holds of the trained parameters and the optimizer's states, under any strategy: ranges.

DDP keeps whole parameters on every rank, ZeRO-1 and 2 a piece of all parameters laid end to end, ZeRO-3 a piece of each
parameter, FSDP2 some rows of each. In the flattened parameter, each of these is ONE range of elements, and the
optimizer's states of these elements are the same range. A checkpoint stores ranges; any strategy at any world size
reads those that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distft.errors import RunError
from distft.train.blocks import reshard
from distft.train.save import unwrapped


@dataclass(frozen=True)
class Share:
    """A range of a flattened parameter. The tensors are 1-D views of those that the training uses."""

    name: str  # of the parameter, as in model.named_parameters()
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # in elements of the flattened parameter
    weights: torch.Tensor  # the optimizer's: float32 masters, or bf16 without them
    states: dict[str, torch.Tensor]  # optimizer states with a value for each element of the range, by their names
    factors: dict[str, torch.Tensor]  # other optimizer states (Adafactor's rows and columns), whole
    copies: int = 1  # number of ranks that hold the same range
    copy: int = 0  # which of them this rank is

    def own(self) -> slice:
        """The part of the range that this rank writes: ranks with the same range share the work."""
        size = len(self.weights)
        return slice(size * self.copy // self.copies, size * (self.copy + 1) // self.copies)


@dataclass(frozen=True)
class _Place:
    """Where a share is stored: from element `offset` of one of the optimizer's parameters."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    parameter: torch.Tensor
    offset: int = 0
    copies: int = 1
    copy: int = 0


class Shares:
    """The shares of this rank. All ranks make, read and write theirs at the same time.

    Raises:
        RunError: DeepSpeed wraps the model in a way that is unknown here.
    """

    def __init__(self, model: Any, optimizer: Any):
        self.zero = model.optimizer if type(model).__name__ == "DeepSpeedEngine" else None
        self.optimizer = _innermost(self.zero or optimizer)
        if self.zero is None:
            reshard(model)  # a gathered unit would look like one whose states are elsewhere
        self.places = list(self._places(unwrapped(model)))
        self.unpacked: list[tuple[torch.Tensor, str, torch.Tensor]] = []

    def read(self) -> list[Share]:
        """All shares of this rank. They have no optimizer states before the first step or make_states."""
        self.unpacked.clear()
        states: dict[int, dict[str, torch.Tensor]] = {}
        found = []
        for place in self.places:
            parameter = place.parameter
            flat = states.setdefault(id(parameter), {}) or dict(self._states(parameter))
            states[id(parameter)] = flat
            weights, part = _local(parameter), slice(place.offset, place.offset + place.size)
            of_elements = {name: value[part] for name, value in flat.items() if value.numel() == weights.numel()}
            factors = {name: value for name, value in flat.items() if name not in of_elements}
            found.append(
                Share(
                    place.name,
                    place.shape,
                    place.start,
                    weights[part],
                    of_elements,
                    factors,
                    place.copies,
                    place.copy,
                )
            )
        return found

    def weights(self) -> Iterator[torch.Tensor]:
        """The weights of every share, without the optimizer's states."""
        for place in self.places:
            yield _local(place.parameter)[place.offset : place.offset + place.size]

    # ---- where shares are stored

    def _places(self, base: Any) -> Iterator[_Place]:
        trained = [(name, p) for name, p in base.named_parameters() if p.requires_grad]
        if self.zero is None:
            for name, parameter in trained:
                yield from _whole(name, parameter)
        elif hasattr(self.zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
            for name, parameter in trained:
                group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = parameter.partition_numel() * dist.get_rank(parameter.ds_process_group)
                size = max(0, min(parameter.partition_numel(), parameter.ds_numel - start))
                flat = self.zero.fp32_partitioned_groups_flat[group]
                yield _Place(name, tuple(parameter.ds_shape), start, size, flat, offset)
        else:
            flats = self._flats()
            for name, parameter in trained:
                found = parameter._hp_mapping  # None where this rank holds no element of it
                if found is not None:
                    here, there = found.lp_fragment_address, found.hp_fragment_address
                    flat = flats[found.param_group_index]
                    yield _Place(name, tuple(parameter.shape), here.start, here.numel, flat, there.start)

    def _flats(self) -> list[torch.Tensor]:
        """This rank's part of the float32 masters of each optimizer group."""
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        for name in names:  # ZeRO-3, ZeRO-1 and 2, ZeRO-1 in bf16 with float32 gradients
            if hasattr(self.zero, name):
                return getattr(self.zero, name)
        raise RunError(f"checkpoint: DeepSpeed's {type(self.zero).__name__} is unknown here")

    # ---- the optimizer's states

    def _states(self, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and flat view of each state of one of the optimizer's parameters, 8-bit ones dequantized."""
        state = self.optimizer.state.get(parameter, {})
        for name, value in state.items():
            if not torch.is_tensor(value) or name in _WITH_8_BIT or value.dim() == 0:
                continue
            value = _local(value)
            if value.dtype == torch.uint8:
                from bitsandbytes.functional import dequantize_blockwise

                # Paged states are CPU tensors over CUDA's managed memory, and their scales are on the GPU.
                scale = {"absmax": state[f"absmax{name[-1]}"], "code": state[f"qmap{name[-1]}"]}
                scale = {key: tensor.to(value.device) for key, tensor in scale.items()}
                value = dequantize_blockwise(value, **scale, blocksize=_BLOCK).cpu()
                self.unpacked.append((parameter, name, value))
            yield name, value

    def _pack(self) -> None:
        """Quantize what was written into states that `_states` dequantized."""
        for parameter, name, values in self.unpacked:
            state = self.optimizer.state[parameter]
            packed, absmax, code = _local(state[name]), state[f"absmax{name[-1]}"], state[f"qmap{name[-1]}"].cpu()
            # Not quantize_blockwise: its scale is a block's largest absolute value, but the code's negative end is
            # -0.993, so each round trip would lose a little where that value is negative.
            blocks = torch.nn.functional.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)
            scale = blocks.amax(1) / code.max()
            if code.min() < 0:
                scale = torch.maximum(scale, blocks.amin(1) / code.min())
            absmax.copy_(scale)
            ends = (code[1:] + code[:-1]) / 2
            nearest = torch.bucketize(blocks / scale.clamp(min=1e-38)[:, None], ends).to(torch.uint8)
            packed.copy_(nearest.view(-1)[: len(values)])

    def steps(self) -> float | None:
        """The optimizer's step count, None before its first step."""
        for state in self.optimizer.state.values():
            if "step" in state:
                return float(state["step"])
        return None

    def make_states(self, steps: float | None) -> None:
        """Have the optimizer allocate its states, by a step with zero gradient and learning rate; set its count."""
        groups = self.optimizer.param_groups
        rates, lists = [group["lr"] for group in groups], [group["params"] for group in groups]
        # ZeRO-3 gives the optimizer one flat parameter at a time, and leaves its groups empty in between.
        flats = self._flats() if self.zero is not None else []
        for group in groups:
            group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
        group_of = getattr(self.zero, "sub_group_to_group_id", {})
        for index, flat in enumerate(flats):
            number = group_of.get(index, index)
            if not any(p is flat for p in groups[number]["params"]):
                groups[number]["params"] = [*groups[number]["params"], flat]
        made = [(p, p.grad) for group in groups for p in group["params"]]
        for parameter, _ in made:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for parameter, gradient in made:
            parameter.grad = gradient
        for group, rate, parameters in zip(groups, rates, lists, strict=True):
            group["lr"], group["params"] = rate, parameters
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(steps or 0)
            elif "step" in state:
                state["step"] = int(steps or 0)

    def take_over(self) -> None:
        """Have the training use what was written into the shares. Collective under ZeRO."""
        self._pack()
        if self.zero is None:
            return
        if not hasattr(self.zero, "fp32_partitioned_groups_flat"):
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for group in range(len(self._flats())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


_BLOCK = 256  # elements per block of bitsandbytes' 8-bit states (optim/optimizer.py)
_WITH_8_BIT = ("qmap1", "qmap2", "absmax1", "absmax2")


def _innermost(optimizer: Any) -> Any:
    """The torch or bitsandbytes optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """A flat view of this rank's part."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def _whole(name: str, parameter: torch.Tensor) -> Iterator[_Place]:
    """The place of a parameter under DDP or FSDP2."""
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        ranks = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        yield _Place(name, shape, 0, parameter.numel(), parameter, 0, *ranks)
        return
    mesh = parameter.device_mesh
    size, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, parameter.placements)
    if prod(size):  # with more ranks than rows, the last ranks have none
        start = offset[0] * prod(shape[1:]) if shape else 0
        copies = (mesh.size(0), mesh.get_local_rank(0)) if mesh.ndim == 2 else (1, 0)  # HSDP
        yield _Place(name, shape, start, prod(size), parameter, 0, *copies)
