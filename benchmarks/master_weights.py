"""What training.master_weights: none costs: held-out losses of full fine-tuning, and what optimizers lose in bf16.

    python benchmarks/master_weights.py [losses] [accumulation] [optimizers] [--quickstart DIR] [--json]

`losses` and `accumulation` train all weights of the quickstart's base model on its signatures, in one process: the rows
and the loss are distft's, in a plain loop, so that torch's AdamW can step bf16 weights as well, which no recipe asks
for. `optimizers` steps 20,000 weights by random gradients. DIR is a folder that `distft quickstart` made; without it,
one is made.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optimi
import torch
from transformers import AutoModelForCausalLM

from distft.config.loading import load_recipe
from distft.data.formats import IGNORE
from distft.train.data import load_prepared
from distft.train.kahan import KahanAdamW
from distft.train.losses import summed_loss

RATES = (1e-5, 2e-5, 2e-4, 1e-3)
KINDS = ("float32 masters", "none (Kahan)", "torch's AdamW in bf16")
SIZE = 20_000
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ids, labels, positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help="of losses, accumulation and optimizers; default: all")
    parser.add_argument("--quickstart", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the model is small
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for section in options.sections or ("optimizers", "losses", "accumulation"):
            if section == "optimizers":
                found[section] = optimizers()
                continue
            folder = options.quickstart or made(Path(name) / "quickstart")
            found[section] = losses(folder) if section == "losses" else accumulation(folder)
    if options.json:
        print(json.dumps(found))


def made(folder: Path) -> Path:
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "distft", "quickstart", str(folder)], check=True, stdout=sys.stderr)
    return folder


# ---- real training


def losses(folder: Path, steps: int = 300) -> list[dict[str, Any]]:
    rows, held_out = prepared(folder)
    print(f"\nheld-out loss after {steps} steps of 8 rows\n{'rate':>8}" + "".join(f"{kind:>24}" for kind in KINDS))
    table = []
    for rate in RATES:
        after = {kind: trained(folder, rows, held_out, kind, rate, steps, 8, 1) for kind in KINDS}
        print(f"{rate:8.0e}" + "".join(f"{after[kind]:24.4f}" for kind in KINDS), flush=True)
        table.append({"rate": rate, **after})
    return table


def accumulation(folder: Path, rate: float = 2e-5, steps: int = 60) -> list[dict[str, Any]]:
    """Gradients of micro-batches are added up in bf16."""
    rows, held_out = prepared(folder)
    print(f"\nheld-out loss after {steps} steps of 32 rows, rate {rate:.0e}\n{'micro-batches':>14}", end="")
    print("".join(f"{kind:>24}" for kind in KINDS[:2]))
    table = []
    for parts in (1, 8, 32):
        after = {kind: trained(folder, rows, held_out, kind, rate, steps, 32, parts) for kind in KINDS[:2]}
        print(f"{parts:14}" + "".join(f"{after[kind]:24.5f}" for kind in KINDS[:2]), flush=True)
        table.append({"micro_batches": parts, **after})
    return table


def prepared(folder: Path) -> tuple[Rows, Rows]:
    data = load_prepared(load_recipe(folder / "recipe.yaml"))
    return tensors(data.train), tensors(data.eval)


def tensors(rows: Any) -> Rows:
    """Rows of the same length. Positions restart at each document, of which the first token is not trained."""
    size = (len(rows), max(len(row["input_ids"]) for row in rows))
    ids, labels, positions = torch.zeros(size, dtype=torch.long), torch.full(size, IGNORE), torch.zeros(size).long()
    for number, row in enumerate(rows):
        length, start = len(row["input_ids"]), 0
        ids[number, :length], labels[number, :length] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        for count in row["seq_lengths"]:
            positions[number, start : start + count] = torch.arange(count)
            labels[number, start] = IGNORE
            start += count
    return ids, labels, positions


def trained(
    folder: Path, rows: Rows, held_out: Rows, kind: str, rate: float, steps: int, batch: int, parts: int
) -> float:
    """The held-out loss after training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)  # all from the same weights
    masters = kind == "float32 masters"
    if masters:
        model.float()
    make = KahanAdamW if kind == "none (Kahan)" else torch.optim.AdamW
    optimizer = make(list(model.parameters()), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def logits(some: Rows, which: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=masters):
            return model(input_ids=some[0][which], position_ids=some[2][which]).logits

    generator, order = torch.Generator().manual_seed(1), torch.zeros(0, dtype=torch.long)
    while len(order) < steps * batch:
        order = torch.cat((order, torch.randperm(len(rows[0]), generator=generator)))
    for step in range(steps):
        scale = (step + 1) / 11 if step < 10 else 0.5 * (1 + math.cos(math.pi * (step - 10) / (steps - 10)))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        chosen = order[step * batch : (step + 1) * batch]
        count = (rows[1][chosen][:, 1:] != IGNORE).sum()
        for part in chosen.chunk(parts):
            (summed_loss(logits(rows, part), rows[1][part])[0] / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = [
            torch.stack(summed_loss(logits(held_out, part), held_out[1][part])).double()
            for part in torch.arange(len(held_out[0])).split(16)
        ]
    total, tokens = torch.stack(found).sum(0)
    return float(total / tokens)


# ---- optimizers alone


def in_optimi(parameters: list[Any], **options: Any) -> Any:
    return optimi.AdamW(parameters, triton=False, foreach=False, **options)


WAYS: dict[str, tuple[Callable[..., Any], torch.dtype]] = {
    "torch's AdamW, float32": (torch.optim.AdamW, torch.float32),
    "distft's, bf16": (KahanAdamW, torch.bfloat16),
    "optimi's, bf16": (in_optimi, torch.bfloat16),
    "torch's AdamW, bf16": (torch.optim.AdamW, torch.bfloat16),
}


def optimizers() -> list[dict[str, Any]]:
    """How much weights of 0.02 shrink by decay in 2,000 steps; how far the second moment is off after 4,000 whose
    gradients fall to a tenth over the first 1,000; how far weights of 1 go in 500 steps at a rate of 1e-6."""
    print(f"\n{'':24}{'shrunk by decay':>17}{'root of 2nd moment / float32s':>31}{'weights of 1 move':>19}")
    table, wanted = [], 0.0
    for name, (make, dtype) in WAYS.items():
        with_decay, without = (stepped(make, dtype, 2000, decay, lambda _: 1.0)[0] for decay in (0.1, 0.0))
        start = weights().double()
        shrunk = float((without - with_decay) @ start / (start @ start))
        moment = stepped(make, dtype, 4000, 0.0, lambda step: 10 ** (-min(step, 1000) / 1000))[1]
        wanted = wanted or moment
        moved = float((stepped(make, dtype, 500, 0.0, lambda _: 1.0, ones=True)[0] - 1).mean())
        print(f"{name:24}{shrunk:17.5f}{moment / wanted:31.3f}{moved:19.2e}", flush=True)
        table.append({"optimizer": name, "shrunk": shrunk, "second_moment": moment / wanted, "moved": moved})
    return table


def weights() -> torch.Tensor:
    return (torch.randn(SIZE, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def stepped(
    make: Callable[..., Any],
    dtype: torch.dtype,
    steps: int,
    decay: float,
    size: Callable[[int], float],
    ones: bool = False,
) -> tuple[torch.Tensor, float]:
    """The weights with what is kept beside them, and the mean root of the second moment, without its bias. `ones`:
    weights of 1, whose gradients are 1 in the mean."""
    weight = torch.nn.Parameter((torch.ones(SIZE) if ones else weights()).to(dtype))
    optimizer = make([weight], lr=1e-6 if ones else 2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        weight.grad = (torch.randn(SIZE, generator=generator) * size(step) + ones).to(dtype)
        optimizer.step()
    state = optimizer.state[weight]
    kept = state.get("kahan_comp")
    moment = state["exp_avg_sq"].double() / (1 if make is in_optimi else 1 - 0.999**steps)  # optimi's has none
    return weight.detach().double() + (kept.double() if kept is not None else 0), float(moment.sqrt().mean())


if __name__ == "__main__":
    main()
