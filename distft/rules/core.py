"""What a rule is, what it checks, and how all of them are applied. The rules are in the other modules of this room."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from distft import extras
from distft.errors import PlanError
from distft.models.attention import AMPERE, FLASH, Flash, no_flash_attention, plain_attention
from distft.models.kinds import has_own_code
from distft.models.quantization import disk_quantization
from distft.strategies.kinds import KINDS, Kind

if TYPE_CHECKING:
    from distft.config.recipe import Recipe, ScriptSettings
    from distft.hardware.devices import Device
    from distft.hardware.topology import Topology
    from distft.models.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Case:
    """One combination to check: a recipe, or your own script, under a strategy on some devices."""

    strategy: str
    offload: str
    shard_size: int
    topology: Topology
    device: Device
    settings: Recipe | ScriptSettings
    bandwidth: float | None = None  # between nodes, GB/s of one node; None: unknown

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
        return self.settings.training.mixed_precision

    @property
    def deepspeed(self) -> Mapping[str, Any]:
        """deepspeed.overrides."""
        return self.settings.deepspeed.overrides

    @property
    def fsdp_config(self) -> Mapping[str, Any]:
        """fsdp.overrides, every key with its `fsdp_`, which accelerate_environment takes off again."""
        given = self.settings.fsdp.overrides
        return {key if key.startswith("fsdp_") else f"fsdp_{key}": value for key, value in given.items()}

    @property
    def fsdp_version(self) -> str:
        return str(self.fsdp_config.get("fsdp_version", 2))

    def zero_option(self, *keys: str) -> Any:
        """What deepspeed.overrides has below zero_optimization; None for nothing."""
        return look(self.deepspeed, "zero_optimization", *keys)

    def offloads(self, what: str) -> bool:
        """Whether parallelism.offload moves the `optimizer`, or the `param`eters."""
        return self.offload == "all" or (self.offload == "optimizer" and what == "optimizer")

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def before_ampere(self) -> bool:
        return (self.device.compute_capability or AMPERE) < AMPERE


@dataclass(frozen=True, kw_only=True)
class ScriptCase(Case):
    """Your own script: nothing is known about its model and its training."""

    settings: ScriptSettings


@dataclass(frozen=True, kw_only=True)
class RecipeCase(Case):
    """A recipe. What is None has not been derived yet, and no rule applies to it."""

    settings: Recipe
    model: ModelShape
    gradient_checkpointing: bool | None = None
    micro_batch_size: int | None = None
    accumulation: int | None = None

    @property
    def recipe(self) -> Recipe:
        return self.settings

    @property
    def quantization(self) -> str | None:
        return self.recipe.model.quantization

    @property
    def trainer(self) -> Mapping[str, Any]:
        """trainer.overrides."""
        return self.recipe.trainer.overrides

    @property
    def optim(self) -> str:
        """The optimizer that actually runs: trainer.overrides may name one that the recipe has no word for."""
        return self.recipe.optim

    @property
    def attention(self) -> str:
        """model.attn_implementation; `auto` is `sdpa`, or `eager`, where FlashAttention-2 cannot run
        (models/attention.py)."""
        wanted, device = self.recipe.model.attn_implementation, self.device
        if wanted != "auto":
            return wanted
        why = no_flash_attention(device.type, device.compute_capability, self.mixed_precision, self.whole_config)
        return plain_attention(self.model_type) if why else "auto"

    @property
    def needs_flash_kernels(self) -> bool:
        """Whether FlashAttention's kernels are asked for: varlen has them on GPUs alone."""
        return self.attention in FLASH or (self.attention == "varlen" and not self.on_cpu)

    @property
    def flash(self) -> Flash:
        """What FlashAttention's kernels can do; varlen has those of the second version."""
        return FLASH.get(self.attention, FLASH["flash_attention_2"])

    @property
    def whole_config(self) -> Mapping[str, Any]:
        """The model's config.json."""
        return self.model.config

    @property
    def config(self) -> Mapping[str, Any]:
        """The language model's part of config.json, where there are several."""
        text = self.whole_config.get("text_config")
        return text if isinstance(text, Mapping) else self.whole_config

    @property
    def model_type(self) -> str:
        return str(self.whole_config.get("model_type") or "")

    @property
    def has_remote_code(self) -> bool:
        """Whether the model comes with its own Python code."""
        return has_own_code(self.whole_config)

    @property
    def runs_remote_code(self) -> bool:
        """Whether that code builds the model, rather than transformers."""
        return self.has_remote_code and self.recipe.model.trust_remote_code

    @property
    def is_moe(self) -> bool:
        """Whether the model is a mixture of experts, by the names that transformers' configs have for their number."""
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        return any(isinstance(n := self.config.get(name), int) and n > 1 for name in names)

    @property
    def disk_quantization(self) -> Mapping[str, Any]:
        """How the weights on disk are quantized already; {} for plain weights."""
        return disk_quantization(self.whole_config)


Check = Callable[[Case], "str | None"]
RecipeCheck = Callable[[RecipeCase], "str | None"]


@dataclass(frozen=True)
class Rule:
    """A named rule. `check` returns what is wrong with a case, or None."""

    name: str
    kind: str  # error: the case cannot run, or would not do what it says; warning: it is unwise
    family: str  # the module it is in
    when: str  # what it applies to, in one line
    source: str
    fix: str
    versions: tuple[str, ...]  # such as "deepspeed<0.19.4": it holds for these only; () for all
    check: Callable[[Any], str | None]  # of a Case, or without for_scripts of a RecipeCase: see `rule`
    for_scripts: bool
    of_config: bool = False  # it needs nothing of the model but config.json, and is checked before anything else

    @property
    def explanation(self) -> str:
        """Why: the check's docstring."""
        return " ".join((self.check.__doc__ or "").split())

    def holds(self) -> bool:
        """Whether the packages installed here are of the versions that this rule is about.

        About a package that is not installed (on a login node) nothing is known, and the rule is silent.
        """
        if not self.versions:
            return True
        found = extras.installed()
        wanted = [parse(requirement) for requirement in self.versions]
        return all(name in found and extras.within(found[name], bounds) for name, bounds in wanted)

    def __call__(self, case: Case) -> str | None:
        """What is wrong with a case and the fix, or None."""
        text = self.check(case) if self.for_scripts or isinstance(case, RecipeCase) else None
        return f"{text}; {self.fix}" if text and self.holds() else None


RULES: list[Rule] = []


@overload
def rule(
    when: str, source: str, fix: str, *, kind: str = "error", versions: Sequence[str] = (), for_scripts: Literal[True]
) -> Callable[[Check], Check]: ...
@overload
def rule(
    when: str, source: str, fix: str, *, kind: str = "error", versions: Sequence[str] = (), of_config: bool = False
) -> Callable[[RecipeCheck], RecipeCheck]: ...
def rule(
    when: str,
    source: str,
    fix: str,
    *,
    kind: str = "error",
    versions: Sequence[str] = (),
    for_scripts: bool = False,
    of_config: bool = False,
) -> Callable[[Any], Any]:
    """Register the function below as a rule of its name; its docstring is the explanation.

    Args:
        when: what it applies to, in one line.
        source: where this can be read, or how it was seen.
        fix: what to do instead, in half a sentence.
        for_scripts: it needs no recipe, and applies to your own scripts too.
        of_config: it needs nothing of the model but config.json.
    """

    def register(check: Any) -> Any:
        name, family = check.__name__.replace("_", "-"), check.__module__.rpartition(".")[2]
        RULES.append(Rule(name, kind, family, when, source, fix, tuple(versions), check, for_scripts, of_config))
        return check

    return register


def broken(case: Case) -> list[tuple[Rule, str]]:
    """The errors of a case: each rule that it breaks, with what is wrong and the fix."""
    return _applied(case, "error")


def unwise(case: Case) -> list[tuple[Rule, str]]:
    """The warnings of a case, likewise."""
    return _applied(case, "warning")


def _applied(case: Case, kind: str, of_config: bool = False) -> list[tuple[Rule, str]]:
    rules = [rule for rule in RULES if rule.kind == kind and rule.of_config >= of_config]
    return [(rule, text) for rule in rules if (text := rule(case))]


def apply(case: Case, of_config: bool = False) -> None:
    """Check a case against every rule.

    Args:
        of_config: only against those that need nothing of the model but config.json.

    Raises:
        PlanError: all rules that it breaks, one per line, with the fix and the rule's name.
    """
    if found := _applied(case, "error", of_config):
        raise PlanError("\n".join(sentences(found)))


def warnings(case: Case) -> list[str]:
    """What is unwise about a case, one sentence each, for plan.warnings."""
    return sentences(unwise(case))


def sentences(found: Sequence[tuple[Rule, str]]) -> list[str]:
    return [f"{text} [{rule.name}]" for rule, text in found]


def parse(requirement: str) -> tuple[str, list[tuple[str, str]]]:
    """`deepspeed>=0.19,<0.19.4` → its name and [(">=", "0.19"), ("<", "0.19.4")]."""
    name = re.split(r"[^\w-]", requirement, maxsplit=1)[0]
    return name, re.findall(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)", requirement)


def look(mapping: Any, *keys: str) -> Any:
    """The value below keys of nested mappings; None where one is missing."""
    for key in keys:
        if not isinstance(mapping, Mapping):
            return None
        mapping = mapping.get(key)
    return mapping


def show(value: Any) -> str:
    """A value in one word, as YAML spells it."""
    if isinstance(value, (Mapping, list)):
        return "a group" if isinstance(value, Mapping) else "a list"
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value)[:60])
