"""What distft says of a plan, of data and of a finished run: lines for people."""

from __future__ import annotations

from typing import Any

from distft.planner.plan import Plan
from distft.run_dir import RunDir
from distft.shell import quote


def plan_lines(plan: Plan) -> list[str]:
    """Strategy, batch, reasons, warnings."""
    devices = f"{plan.topology.nnodes} x {plan.topology.nproc_per_node} {plan.device.name}"
    lines = [f"plan: {plan.strategy} on {devices}, mixed precision {plan.mixed_precision}"]
    if plan.batch:
        b = plan.batch
        lines.append(
            f"  global batch {b.global_batch_size} = {b.micro_batch_size} micro x {b.gradient_accumulation_steps} "
            f"accumulation x {plan.topology.world_size} ranks"
        )
    if plan.model:
        m = plan.model
        lines.append(f"  {m.parameters:,} parameters, {m.trainable_parameters:,} trained")
    return [*lines, *(f"  {reason}" for reason in plan.reasons), *(f"warning: {text}" for text in plan.warnings)]


def data_lines(counts: dict[str, dict[str, Any]]) -> list[str]:
    """Documents, rows and tokens of each split, and what was too long."""
    lines = []
    for split, count in counts.items():
        packed = f" in {count['rows']:,} packed rows" if count["rows"] != count["documents"] else ""
        lines.append(
            f"{split}: {count['documents']:,} documents{packed}, {count['tokens']:,} tokens "
            f"({count['trained_tokens']:,} trained on)"
        )
        if count["long_rows"]:
            lines.append(
                f"warning: {count['long_rows']:,} rows of {split} were longer than max_length (the longest "
                f"{count['longest']:,} tokens) and {count['done']}; the first: {count['examples'][0]}"
            )
    return lines


def result_lines(run: RunDir) -> list[str]:
    """Where the result lies, and what it achieved."""
    status = run.read_status()
    lines = []
    if "heldout_loss_after" in status:
        lines.append(f"held-out loss: {status['heldout_loss_before']:.4f} -> {status['heldout_loss_after']:.4f}")
    if run.final.is_dir():
        return [*lines, f"done: {run.final}"]
    return [*lines, f"done; what it printed: distft logs {quote(str(run.path))}"]  # a script of one's own
