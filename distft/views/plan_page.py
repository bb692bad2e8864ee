"""`distft plan` as a page of text: the verdict, candidates, memory by component, limits, reasons."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

import click

from distft.models.lora import ranks_in_words
from distft.planner.limits import Limits
from distft.planner.plan import PRECISIONS, RecipePlan
from distft.planner.search import ABOUT
from distft.units import GIB, gib, short

MOMENTS = {
    "load": "loading of the model",
    "forward": "forward pass",
    "loss": "loss computation",
    "backward": "backward pass",
    "optimizer": "optimizer step",
}
COMPONENTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "overhead")
COLOURS = ("blue", "cyan", "magenta", "yellow", "red", "green", "white")
MARKS = "█▓▒░█▓▒"  # neighbours also differ without colours


def lines(plan: RecipePlan, limits: Limits, fixes: Sequence[str], width: int) -> Iterator[str]:
    """The page, `width` columns wide. `fixes`: changes that make a plan fit that does not."""
    first, *more = _wrapped(_verdict(plan), width)
    word, colon, rest = first.partition(":")
    colour = "yellow" if plan.fits is None else "green" if plan.fits else "red"
    yield click.style(word, fg=colour, bold=True) + colon + rest
    yield from more
    for fix in fixes:
        yield from _wrapped(f"would fit: {fix}", width, "  ")
    yield ""
    yield from _job(plan, width)
    yield from _table(plan, width)
    yield from _memory(plan, width)
    for title, sentences in (
        ("data", plan.data),
        ("limits", list(_limits(plan, limits))),
        ("why", plan.reasons),
        ("what would change it", list(_changes(plan))),
        ("assumed (times are estimates)" if plan.assumptions else "", plan.assumptions),
    ):
        if sentences:
            yield ""
            yield click.style(title, bold=True)
            for sentence in sentences:
                yield from _wrapped(sentence, width, "  ")
    for warning in plan.warnings:
        yield ""
        yield from _wrapped(f"warning: {warning}", width, "")


def _verdict(plan: RecipePlan) -> str:
    where = f"{plan.topology.nnodes} x {plan.topology.nproc_per_node} {plan.device.name}"
    need = f"{gib(plan.memory.process)} of {gib(plan.device.memory)} per rank"
    if host := plan.memory.much_of_host:
        known = plan.chosen.host_memory
        need += f", {gib(host)}{f' of {gib(known)}' if known else ''} of host memory per node"
    verdict = "does not fit"
    if plan.fits:
        narrowly = f"fits narrowly (within the estimate's error of ±{plan.memory.error:.0%})"
        verdict = "fits" if plan.chosen.roomy else narrowly
    if plan.fits is None:
        verdict = "not known whether it fits"
    return f"{verdict}: {plan.chosen.name} on {where}, {need} ({plan.how})"


def _job(plan: RecipePlan, width: int) -> Iterator[str]:
    m, b, recipe = plan.model, plan.batch, plan.recipe
    adapters = ranks_in_words(recipe.lora) if recipe.lora else "full fine-tuning"
    if recipe.training.train_only:
        adapters = "fine-tuning of a part"
    quantized = f" on {recipe.model.quantization}" if recipe.model.quantization else ""
    precision = PRECISIONS[plan.mixed_precision]
    if recipe.training.is_pure_bf16:
        precision += " without float32 masters"
    yield from _wrapped(
        f"{m.name}: {m.parameters:,} parameters, {m.trainable_parameters:,} trained "
        f"({adapters}{quantized}, {precision}, {recipe.training.optim})",
        width,
    )
    ranks = plan.topology.world_size
    yield from _wrapped(
        f"global batch {b.global_batch_size} = {b.micro_batch_size} micro x {b.gradient_accumulation_steps} "
        f"accumulation x {ranks} rank{'s' * (ranks > 1)}, rows of {recipe.data.max_length:,} tokens",
        width,
    )
    if speed := _speed(plan):
        yield from _wrapped(speed, width)


def _speed(plan: RecipePlan) -> str | None:
    s = plan.speed
    if s.step_seconds is None:
        return None
    steps = plan.recipe.training.max_steps or 1000
    seconds = steps * s.step_seconds
    gpu_hours = seconds / 3600 * plan.topology.world_size
    cost = f", {gpu_hours:,.1f} GPU-hours" if gpu_hours >= 0.05 and plan.device.type == "cuda" else ""
    if plan.price:
        cost += f", {gpu_hours * plan.price:,.2f} at {plan.price:g} per GPU-hour"
    mfu = f" (MFU {s.assumed_mfu:.0%})" if s.assumed_mfu else ""
    return (
        f"about {short(s.step_seconds)} s per step, {s.tokens_per_second_per_gpu:,.0f} tokens/s per rank{mfu}; "
        f"{steps:,} steps take {_duration(seconds)}{cost}"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{short(seconds)} s"


def _table(plan: RecipePlan, width: int) -> Iterator[str]:
    yield ""
    rows = [("candidate", "checkpointing", "micro", "GiB/rank", "s/step", "")]
    chosen = plan.chosen
    for c in plan.candidates:
        seconds = "" if c.speed.step_seconds is None else short(c.seconds)
        note = "chosen" if c is chosen else ""
        if c.broken:
            note = f"rule {c.broken[0].rpartition('[')[2].rstrip(']')}"
        elif c.missing:
            note = c.missing
        rows.append(
            (
                ("> " if c is chosen else "  ") + c.name,
                "on" if c.setting.gradient_checkpointing else "off",
                str(c.batch.micro_batch_size),
                f"{c.memory.process / GIB:.1f}",
                seconds,
                note,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for index, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [row[i].rjust(widths[i]) for i in (2, 3, 4)]
        text = "  ".join(cells)
        line = f"{text}  {row[5]}".rstrip()
        if len(line) > width:  # a narrow window: the note goes below
            yield text.rstrip()
            line = f"      {row[5]}"
        yield click.style(line, bold=True) if index == 0 or row[5] == "chosen" else line


def _memory(plan: RecipePlan, width: int) -> Iterator[str]:
    m, capacity = plan.memory, plan.device.memory
    sizes = [getattr(m, component) for component in COMPONENTS]
    # Without the gradients that do not exist yet at the peak, so that the parts add up to it.
    sizes[1] = max(0, m.peak - (sum(sizes[:6]) - sizes[1]))
    yield ""
    yield click.style(f"peak memory of a rank, in the {MOMENTS[m.moment]}, of {gib(capacity)}", bold=True)
    room = max(20, width - 4)
    scale = room / max(capacity, m.process)
    bar, used = "", 0
    for index in range(len(sizes)):
        end = round(sum(sizes[: index + 1]) * scale)
        bar += click.style(MARKS[index] * (end - used), fg=COLOURS[index])
        used = max(used, end)
    limit = round(capacity * scale)
    bar += "·" * (limit - used)
    yield f"  {bar}" + ("|" if used <= limit else "")
    if used > limit:
        yield " " * (2 + limit) + "^ capacity"
    pieces = [
        (f"{MARKS[i]} {component} {gib(size)}", COLOURS[i])
        for i, (component, size) in enumerate(zip(COMPONENTS, sizes, strict=True))
        if size
    ]
    pieces.append((f"· free {gib(max(0, capacity - m.process))}", "white"))
    line, length = "", 0
    for text, colour in pieces:
        if length + len(text) + 3 > width:
            yield f"  {line}".rstrip()
            line, length = "", 0
        line += click.style(text[0], fg=colour) + text[1:] + "   "
        length += len(text) + 3
    yield f"  {line}".rstrip()
    if m.much_of_host:
        yield f"  host memory per node: {gib(m.host_per_node)}"


def _limits(plan: RecipePlan, limits: Limits) -> Iterator[str]:
    if plan.guessed:
        return
    f = limits.fewest_gpus
    if f:
        shape = f"{f.world_size} ({f.nnodes} x {f.nproc_per_node})"
        yield f"fewest such GPUs on which it fits without more offload: {shape}"
    else:
        yield "without more offload it does not fit on any number of such GPUs that divides the global batch"
    free = plan.recipe.training.gradient_checkpointing == "auto"
    how = "with gradient checkpointing" if free else "with the recipe's settings"
    if length := limits.max_length:
        positions = plan.model.config.get("max_position_embeddings")
        beyond = isinstance(positions, int) and positions < length
        more = f", more than the model's {positions:,} positions" if beyond else ""
        yield f"longest rows that fit here, one at a time, {how}: {length:,} tokens (in steps of 64){more}"
    if limits.micro_batch_size:
        yield f"largest micro-batch that fits here, {how}: {limits.micro_batch_size}"


def _changes(plan: RecipePlan) -> Iterator[str]:
    """Faster candidates that miss by little, and by how much."""
    chosen = plan.chosen
    for c in plan.candidates if not plan.guessed else ():
        faster = c.speed.step_seconds and chosen.speed.step_seconds and c.seconds < chosen.seconds / ABOUT
        if faster and not c.rejected and not c.host_excess and 0 < c.excess < c.capacity / 2:
            yield f"with {gib(c.excess)} more per rank {c.name} would fit, at about {short(c.seconds)} s per step"


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)
