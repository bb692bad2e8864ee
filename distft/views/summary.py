"""A plan, prepared data and a finished run as lines for people."""

from __future__ import annotations

from typing import Any

from distft.data.reading import empty_lines, left_out_lines, odd_lines
from distft.planner.plan import Plan, RecipePlan
from distft.runs import measured
from distft.runs.directory import RunDir
from distft.runs.status import Status, read_status
from distft.shell import quote
from distft.units import gib, plural, short


def plan_lines(plan: Plan) -> list[str]:
    """Strategy, batch, memory, reasons and warnings of a plan."""
    devices = f"{plan.topology.nnodes} x {plan.topology.nproc_per_node} {plan.device.name}"
    name = plan.chosen.name if isinstance(plan, RecipePlan) else plan.strategy
    lines = [f"plan: {name} on {devices}, mixed precision {plan.mixed_precision}"]
    if isinstance(plan, RecipePlan):
        b, m, memory, speed = plan.batch, plan.model, plan.memory, plan.speed.step_seconds
        lines.append(
            f"  global batch {b.global_batch_size} = {b.micro_batch_size} micro x {b.gradient_accumulation_steps} "
            f"accumulation x {plan.topology.world_size} rank{'s' * (plan.topology.world_size > 1)}"
        )
        lines.append(f"  {m.parameters:,} parameters, {m.trainable_parameters:,} trained")
        host = f", {gib(memory.host_per_node)} of host memory per node" if memory.much_of_host else ""
        lines.append(
            f"  {plan.how}: {gib(memory.process)} of {gib(plan.device.memory)} per rank{host}"
            + (f", {short(speed)} s per step" if speed else "")
        )
        lines += [f"  {line}" for line in plan.data]
    return [*lines, *(f"  {reason}" for reason in plan.reasons), *(f"warning: {text}" for text in plan.warnings)]


def beside_plan(run: RunDir) -> dict[str, dict[str, float | None]]:
    """What the plan of a run predicted, and what was measured; {} before the first step.

    Memory is torch's peak on a GPU and that of the process on a CPU, in bytes.
    """
    found, plan = measured.measured(run), measured.planned(run)
    if not found or not plan:
        return {}
    memory = plan["memory"]["peak" if plan["topology"]["gpu"] else "process"]
    speed = plan["time"]["tokens_per_second_per_gpu"]
    return {
        "predicted": {
            "memory_bytes": memory,
            "tokens_per_second": speed and speed * plan["topology"]["world_size"],
        },
        "measured": {"memory_bytes": found.peak_memory, "tokens_per_second": found.tokens_per_second},
    }


def beside_plan_lines(run: RunDir) -> list[str]:
    """The same for people."""
    found = beside_plan(run)
    if not found:
        return []
    predicted, got, lines = found["predicted"], found["measured"], []
    memory, planned = got["memory_bytes"], predicted["memory_bytes"]
    if memory is not None and planned is not None:
        lines.append(f"  memory of a rank: {gib(memory)}, predicted {gib(planned)} ({memory / planned:.0%} of it)")
    speed = f", predicted {predicted['tokens_per_second']:,.0f}" if predicted["tokens_per_second"] else ""
    return [*lines, f"  tokens/s of all ranks: {got['tokens_per_second']:,.0f}{speed}"]


def data_lines(counts: dict[str, dict[str, Any]]) -> list[str]:
    """Documents, rows and tokens of each split, and how many rows were too long."""
    lines = []
    for split, count in counts.items():
        packed = f" in {plural(count['rows'], 'packed row')}" if count["rows"] != count["documents"] else ""
        lines.append(
            f"{split}: {plural(count['documents'], 'document')}{packed}, {plural(count['tokens'], 'token')} "
            f"({count['trained_tokens']:,} trained on)"
        )
        lines += [
            f"  {plural(have, 'row')} of {path}: {taken:,} taken" + ", some more than once" * (taken > have)
            for path, have, taken in count["mix"]
        ]
        lines += left_out_lines(split, count["untrained"])
        lines += odd_lines(split, count["odd"])
        lines += empty_lines(split, count["empty"])
        if count["long_rows"] and count["done"]:  # else they are an error
            were, (place, tokens) = "was" if count["long_rows"] == 1 else "were", count["examples"][0]
            lines.append(
                f"warning: {plural(count['long_rows'], 'row')} of {split} {were} longer than max_length (the longest "
                f"{plural(count['longest'], 'token')}) and {count['done']}; the first: {place}: "
                f"{plural(tokens, 'token')}"
            )
        if count["cut_answers"]:
            lines.append(
                f"warning: {count['cut_answers']:,} of them left out, with all that is trained cut off; the first: "
                f"{count['cut_examples'][0]}"
            )
        if count["thoughtless"]:
            lines.append(
                f"warning: the chat template removes the thought of {plural(count['thoughtless'], 'earlier answer')} "
                f"of {split}: {count['thoughtless_done']}; data.train_on: all_with_reasoning trains answer and thought"
            )
    notes = dict.fromkeys(note for count in counts.values() for note in count["notes"])
    lines += [f"warning: {note}" for note in notes]
    return lines


def loss_name(loss_type: str | None) -> str:
    """`loss`, or what it is where it is not the plain cross-entropy: `loss (dft)`."""
    return f"loss ({loss_type})" if loss_type else "loss"


def eval_losses(status: Status) -> str:
    """The eval loss before the training and, once it is measured, after; "" where there is no eval data."""
    return " -> ".join(f"{loss:.4f}" for loss in (status.eval_loss_before, status.eval_loss_after) if loss is not None)


def result_lines(run: RunDir) -> list[str]:
    """Where the result is, and its eval loss."""
    status = read_status(run)
    lines = []
    if status.eval_loss_after is not None:
        lines.append(f"eval loss: {eval_losses(status)}")
    if run.final.is_dir():
        return [*lines, f"done: {run.final}"]
    return [*lines, f"done; its output: distft logs {quote(str(run.path))}"]  # the user's own script
