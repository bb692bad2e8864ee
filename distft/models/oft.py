"""The sizes of peft's OFT: a layer's inputs in blocks, each rotated by a matrix (peft/tuners/oft/layer.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.config.recipe import Oft

BLOCK_SIZE = 32  # OFTConfig.oft_block_size


def blocks_of(oft: Oft, width: int) -> tuple[int, int]:
    """Number and size of the blocks of a layer's `width` inputs."""
    if oft.r is not None:
        blocks = nearest(width, oft.r)
        return blocks, width // blocks
    size = nearest(width, oft.oft_block_size or BLOCK_SIZE)
    return width // size, size


def nearest(width: int, wanted: int) -> int:
    """The divisor of `width` that peft takes (adjust_oft_parameters): the nearest, of two the smaller."""
    if wanted >= width:
        return width
    higher = next(n for n in range(wanted, width + 1) if width % n == 0)
    lower = next(n for n in range(wanted, 0, -1) if width % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def shape_of(oft: Oft, width: int) -> tuple[int, int]:
    """Shape of what is trained: for each block, or for all of them, what is above the diagonal of a skew-symmetric
    matrix."""
    blocks, size = blocks_of(oft, width)
    return 1 if oft.block_share else blocks, size * (size - 1) // 2


def is_exact(oft: Oft, width: int) -> bool:
    """Whether a layer of this width is divided as it was asked for."""
    blocks, size = blocks_of(oft, width)
    return blocks == oft.r if oft.r is not None else size == (oft.oft_block_size or BLOCK_SIZE)


def kind(oft: Oft) -> str:
    """What its adapters are called."""
    return "constrained OFT" if oft.coft else "OFT"


def blocks_in_words(oft: Oft) -> str:
    """The blocks that were asked for."""
    return f"{oft.r} blocks" if oft.r is not None else f"blocks of {oft.oft_block_size or BLOCK_SIZE}"


def peft_fields(oft: Oft) -> dict[str, Any]:
    """Arguments of peft's OFTConfig, which has 0 for the one of the two that follows from the other."""
    size = oft.oft_block_size or (0 if oft.r else BLOCK_SIZE)
    return {**oft.model_dump(), "r": oft.r or 0, "oft_block_size": size}
