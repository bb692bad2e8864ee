"""What a rule is, what it looks at, and how all of them are applied. The rules themselves are this module's siblings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from distft import train_part
from distft.errors import PlanError

if TYPE_CHECKING:
    from distft.devices import Device
    from distft.planner.model_shapes import ModelShape
    from distft.recipe import Recipe, ScriptSettings
    from distft.topology import Topology

Bounds = list[tuple[str, str]]  # [(">=", "5.21"), ("<", "6")]


@dataclass(frozen=True)
class Case:
    """One combination to check: a recipe under a strategy on some devices.

    A script of one's own has `script` instead of `recipe`, and nothing is known of its model. What is None has not been
    worked out (yet), and no rule fires for it.
    """

    strategy: str
    offload: str
    shard_size: int
    topology: Topology
    device: Device
    recipe: Recipe | None = None
    script: ScriptSettings | None = None
    model: ModelShape | None = None
    bandwidth: float | None = None  # between nodes, GB/s of one node
    gradient_checkpointing: bool | None = None
    accumulation: int | None = None
    micro_batch_size: int | None = None
    largest_micro_batch_size: int | None = None  # that fits and divides a rank's share
    fits_replicated: bool | None = None  # whether it would fit with whole weights on every rank
    fits_without_checkpointing: bool | None = None

    @property
    def fsdp(self) -> bool:
        return self.strategy in ("fsdp", "hsdp")

    @property
    def zero(self) -> bool:
        return self.strategy.startswith("zero")

    @property
    def shards_parameters(self) -> bool:
        return self.fsdp or self.strategy == "zero3"

    @property
    def mixed_precision(self) -> str:
        settings = self.recipe or self.script
        return settings.training.mixed_precision if settings else "no"

    @property
    def quantization(self) -> str | None:
        return self.recipe.model.quantization if self.recipe else None

    @property
    def trainer(self) -> Mapping[str, Any]:
        """trainer.overrides."""
        return self.recipe.trainer.overrides if self.recipe else {}

    @property
    def deepspeed(self) -> Mapping[str, Any]:
        """deepspeed.overrides."""
        settings = self.recipe or self.script
        return settings.deepspeed.overrides if settings else {}

    @property
    def fsdp_config(self) -> Mapping[str, Any]:
        """fsdp.overrides, every key with its `fsdp_`, which accelerate_environment takes away again."""
        settings = self.recipe or self.script
        given = settings.fsdp.overrides if settings else {}
        return {key if key.startswith("fsdp_") else f"fsdp_{key}": value for key, value in given.items()}

    def zero_option(self, *keys: str) -> Any:
        """What deepspeed.overrides says below zero_optimization; None for nothing."""
        return look(self.deepspeed, "zero_optimization", *keys)

    @property
    def optim(self) -> str:
        """The optimizer that really runs: trainer.overrides may name one that the recipe has no word for."""
        return str(self.trainer.get("optim", self.recipe.training.optim if self.recipe else ""))

    @property
    def attention(self) -> str:
        """model.attn_implementation; `auto` is sdpa wherever FlashAttention-2 cannot be (train/model.py)."""
        wanted = self.recipe.model.attn_implementation if self.recipe else "auto"
        if wanted == "auto" and (self.before_ampere or self.device.type == "cpu" or self.mixed_precision == "no"):
            return "sdpa"
        return wanted

    @property
    def before_ampere(self) -> bool:
        return (self.device.compute_capability or 8) < 8

    @property
    def whole_config(self) -> Mapping[str, Any]:
        """The model's config.json."""
        return self.model.config if self.model else {}

    @property
    def config(self) -> Mapping[str, Any]:
        """The language model's part of config.json, where there are several."""
        text = self.whole_config.get("text_config")
        return text if isinstance(text, Mapping) else self.whole_config

    @property
    def model_type(self) -> str:
        return str(self.whole_config.get("model_type") or "")

    @property
    def own_code(self) -> bool:
        """Whether Python code that comes with the model makes it, not transformers."""
        trusted = bool(self.recipe and self.recipe.model.trust_remote_code)
        return trusted and look(self.whole_config, "auto_map", "AutoModelForCausalLM") is not None

    @property
    def is_moe(self) -> bool:
        """A mixture of experts, by the words that transformers' configs have for their number."""
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        return any(isinstance(n := self.config.get(name), int) and n > 1 for name in names)

    @property
    def disk_quantization(self) -> Mapping[str, Any]:
        """How the weights on disk are quantised already; {} for plain weights."""
        found = self.whole_config.get("quantization_config")
        return found if isinstance(found, Mapping) else {}


Check = Callable[[Case], "str | None"]


@dataclass(frozen=True)
class Rule:
    """A named rule. `check` says what is wrong with a case, or nothing."""

    name: str
    kind: str  # error: the case cannot run, or would not do what it says; warning: it is unwise
    family: str  # the module it stands in
    source: str
    mend: str
    explanation: str
    versions: tuple[str, ...]  # such as "deepspeed<0.19.4": it holds for these alone; () for all
    check: Check
    for_scripts: bool

    @property
    def headline(self) -> str:
        """The explanation's first sentence."""
        return re.split(r"(?<=[a-z0-9\")])\. (?=[A-Z])", self.explanation)[0].rstrip(".")

    def holds(self) -> bool:
        """Whether the packages installed here are of the versions that this rule is about.

        One that is not here (on a login node) is taken as the newest that distft[train] accepts.
        """
        for requirement in self.versions:
            package, bounds = parse(requirement)
            try:
                version = metadata.version(package)
            except metadata.PackageNotFoundError:
                version = _newest(package)
            if not train_part.within(version, bounds):
                return False
        return True


@dataclass(frozen=True)
class Broken:
    """A rule, and what it says of a case."""

    rule: Rule
    text: str

    def __str__(self) -> str:
        return f"{self.text}; {self.rule.mend} [{self.rule.name}]"


RULES: list[Rule] = []


def rule(
    source: str, mend: str, *, kind: str = "error", versions: Sequence[str] = (), for_scripts: bool = False
) -> Callable[[Check], Check]:
    """Register the function below under its name; its docstring is the explanation.

    Args:
        source: where it can be read or seen that this is so.
        mend: what to do instead, in half a sentence.
        for_scripts: it needs no recipe, and holds for a script of one's own too.
    """

    def register(check: Check) -> Check:
        name, family = check.__name__.replace("_", "-"), check.__module__.rpartition(".")[2]
        explanation = " ".join(inspect.cleandoc(check.__doc__ or "").split())
        RULES.append(Rule(name, kind, family, source, mend, explanation, tuple(versions), check, for_scripts))
        return check

    return register


def broken(case: Case, kind: str | None = None) -> list[Broken]:
    """All that a case breaks (of one kind), in the order of RULES."""
    return [
        Broken(rule, text)
        for rule in RULES
        if kind in (None, rule.kind) and (case.recipe or rule.for_scripts) and (text := rule.check(case))
        # The versions last: asking for one opens a file.
        if rule.holds()
    ]


def apply(case: Case) -> None:
    """Check a case against every rule.

    Raises:
        PlanError: what it breaks, a line each, with the mend and the rule's name.
    """
    if found := broken(case, "error"):
        raise PlanError("\n".join(map(str, found)))


def warnings(case: Case) -> list[str]:
    """What is unwise about a case, a sentence each."""
    return [str(found) for found in broken(case, "warning")]


def parse(requirement: str) -> tuple[str, Bounds]:
    """`deepspeed>=0.19,<0.19.4` → name and bounds."""
    name = re.match(r"[\w-]+", requirement)[0]
    return name, re.findall(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)", requirement)


def _newest(package: str) -> str:
    """The newest release of a package that distft[train] accepts: just below its upper bound."""
    try:
        bounds = dict(train_part.requirements()).get(package, [])
    except metadata.PackageNotFoundError:  # a copy of the sources without metadata
        bounds = []
    upper = next((version for operator, version in bounds if operator == "<"), None)
    if upper is None:
        return "9999"
    *before, last = (int(part) for part in upper.split("."))
    return ".".join(map(str, [*before, last - 1, 9999]))  # 5.24 -> 5.23.9999


def look(mapping: Any, *keys: str) -> Any:
    """The value below keys of nested mappings; None where one is missing."""
    for key in keys:
        if not isinstance(mapping, Mapping):
            return None
        mapping = mapping.get(key)
    return mapping


def show(value: Any) -> str:
    """A value in a word, as YAML spells it."""
    if isinstance(value, (Mapping, list)):
        return "a group" if isinstance(value, Mapping) else "a list"
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value)[:60])
