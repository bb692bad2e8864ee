"""What a rule is, what it looks at, and how all of them are applied. The rules are this module's siblings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft import extras
from distft.errors import PlanError
from distft.models.attention import AMPERE, no_flash_attention
from distft.strategies.kinds import KINDS, Kind

if TYPE_CHECKING:
    from distft.config.recipe import Recipe, ScriptSettings
    from distft.hardware.devices import Device
    from distft.hardware.topology import Topology
    from distft.models.shapes import ModelShape


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
    head_dim: int | None = None
    model: ModelShape | None = None
    script: ScriptSettings | None = None
    bandwidth: float | None = None  # between nodes, GB/s of one node
    gradient_checkpointing: bool | None = None
    micro_batch_size: int | None = None
    accumulation: int | None = None

    @property
    def kind(self) -> Kind:
        return KINDS[self.strategy]

    @property
    def fsdp(self) -> bool:
        return self.kind.engine == "fsdp2"

    @property
    def zero(self) -> bool:
        return self.kind.engine == "deepspeed"

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's stage; None under another engine."""
        return self.kind.zero_stage

    @property
    def shards_parameters(self) -> bool:
        return self.kind.shards_parameters

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

    @property
    def fsdp_version(self) -> str:
        return str(self.fsdp_config.get("fsdp_version", 2))

    def zero_option(self, *keys: str) -> Any:
        """What deepspeed.overrides says below zero_optimization; None for nothing."""
        return look(self.deepspeed, "zero_optimization", *keys)

    def offloads(self, what: str) -> bool:
        """Whether parallelism.offload moves the `optimizer`, or the `param`eters."""
        return self.offload == "all" or (self.offload == "optimizer" and what == "optimizer")

    @property
    def optim(self) -> str:
        """The optimizer that really runs: trainer.overrides may name one that the recipe has no word for."""
        return str(self.trainer.get("optim", self.recipe.training.optim if self.recipe else ""))

    @property
    def attention(self) -> str:
        """model.attn_implementation; `auto` is `sdpa` where FlashAttention-2 cannot run (models/attention.py)."""
        wanted = self.recipe.model.attn_implementation if self.recipe else "auto"
        device = self.device
        if wanted == "auto" and no_flash_attention(device.type, device.compute_capability, self.mixed_precision):
            return "sdpa"
        return wanted

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def before_ampere(self) -> bool:
        return (self.device.compute_capability or AMPERE) < AMPERE

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
    def has_code(self) -> bool:
        """Whether Python code of its own comes with the model."""
        return look(self.whole_config, "auto_map", "AutoModelForCausalLM") is not None

    @property
    def own_code(self) -> bool:
        """Whether that code makes the model, not transformers."""
        return self.has_code and bool(self.recipe and self.recipe.model.trust_remote_code)

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
    when: str  # it fires, in a line
    source: str
    mend: str
    versions: tuple[str, ...]  # such as "deepspeed<0.19.4": it holds for these alone; () for all
    check: Check
    for_scripts: bool

    @property
    def explanation(self) -> str:
        """Why: the check's docstring."""
        return " ".join((self.check.__doc__ or "").split())

    def holds(self) -> bool:
        """Whether the packages installed here are of the versions that this rule is about.

        One that is not installed (on a login node) says nothing, and the rule is silent.
        """
        if not self.versions:
            return True
        found = extras.installed()
        wanted = [parse(requirement) for requirement in self.versions]
        return all(name in found and extras.within(found[name], bounds) for name, bounds in wanted)

    def __call__(self, case: Case) -> str | None:
        """What is wrong with a case and the mend, or None."""
        text = self.check(case) if case.recipe or self.for_scripts else None
        return f"{text}; {self.mend}" if text and self.holds() else None


RULES: list[Rule] = []


def rule(
    when: str, source: str, mend: str, *, kind: str = "error", versions: Sequence[str] = (), for_scripts: bool = False
) -> Callable[[Check], Check]:
    """Register the function below under its name; its docstring is the explanation.

    Args:
        when: what it fires for, in a line.
        source: where it can be read or seen that this is so.
        mend: what to do instead, in half a sentence.
        for_scripts: it needs no recipe, and holds for a script of one's own too.
    """

    def register(check: Check) -> Check:
        name, family = check.__name__.replace("_", "-"), check.__module__.rpartition(".")[2]
        RULES.append(Rule(name, kind, family, when, source, mend, tuple(versions), check, for_scripts))
        return check

    return register


def broken(case: Case) -> list[tuple[Rule, str]]:
    """The errors of a case: each rule that it breaks, with what is wrong and the mend."""
    return _applied(case, "error")


def unwise(case: Case) -> list[tuple[Rule, str]]:
    """The same for warnings."""
    return _applied(case, "warning")


def _applied(case: Case, kind: str) -> list[tuple[Rule, str]]:
    return [(rule, text) for rule in RULES if rule.kind == kind and (text := rule(case))]


def apply(case: Case) -> None:
    """Check a case against every rule.

    Raises:
        PlanError: all that it breaks, a line each, with the mend and the rule's name.
    """
    if found := broken(case):
        raise PlanError("\n".join(sentences(found)))


def warnings(case: Case) -> list[str]:
    """What is unwise about a case, a sentence each, for plan.warnings."""
    return sentences(unwise(case))


def sentences(found: Sequence[tuple[Rule, str]]) -> list[str]:
    return [f"{text} [{rule.name}]" for rule, text in found]


def parse(requirement: str) -> tuple[str, list[tuple[str, str]]]:
    """`deepspeed>=0.19,<0.19.4` → its name and [(">=", "0.19"), ("<", "0.19.4")]."""
    name = re.match(r"[\w-]+", requirement)[0]
    return name, re.findall(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)", requirement)


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
