"""The longest rows that fit, by plan: with the logits of all tokens at once, and in chunks (training.loss).

python benchmarks/longest_rows.py       half a minute, no GPU

One row a micro-batch on H100s of 80 GB, gradient checkpointing, FlashAttention, bf16; in steps of 256 tokens.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.model_configs import CONFIGS
from distft.config.loading import load_recipe
from distft.hardware.devices import named_device
from distft.hardware.topology import Topology
from distft.planner.plan import make_plan
from distft.planner.search import Where

STEP, MOST = 256, 2**19
ROWS = (
    ("llama-3.1-8b", 1, {"r": 16}, None),
    ("llama-3.1-8b", 1, {"r": 16}, "nf4"),
    ("llama-3.1-8b", 8, None, None),
    ("llama-3.1-70b", 8, {"r": 16}, None),
    ("llama-3.1-70b", 8, {"r": 16}, "nf4"),
)


def longest(
    folder: Path, model: str, gpus: int, lora: dict[str, int] | None, quantization: str | None, loss: str
) -> int:
    """Tokens of the longest row with which some strategy fits."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIGS[model]))
    (folder / "data.jsonl").write_text('{"text": "a"}\n')
    where = Where(Topology(1, gpus), named_device("H100", gpus))

    def fits(steps: int) -> bool:
        recipe = {
            "name": "rows",
            "model": {
                "name_or_path": str(folder / "model"),
                "quantization": quantization,
                "attn_implementation": "flash_attention_2",
            },
            "data": {"train": str(folder / "data.jsonl"), "max_length": STEP * steps},
            "lora": lora,
            "training": {
                "global_batch_size": gpus,
                "micro_batch_size": 1,
                "gradient_checkpointing": True,
                "loss": loss,
            },
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        return bool(make_plan(load_recipe(folder / "recipe.yaml"), where).fits)

    low, high = 0, MOST // STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return STEP * low


def main() -> None:
    print(f"{'model':14} {'H100s':>5} {'trained':12} {'full':>8} {'chunked':>8}  tokens a row")
    with tempfile.TemporaryDirectory() as name:
        for model, gpus, lora, quantization in ROWS:
            found = [longest(Path(name), model, gpus, lora, quantization, loss) for loss in ("full", "chunked")]
            trained = "all" if lora is None else f"lora {quantization or ''}"
            print(f"{model:14} {gpus:5} {trained:12} {found[0]:8,} {found[1]:8,}", flush=True)


if __name__ == "__main__":
    main()
