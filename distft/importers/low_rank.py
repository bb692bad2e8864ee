"""GaLore and APOLLO: LLaMA-Factory's options (train/trainer_utils.py) and transformers' (trainer_optimizer.py)."""

from __future__ import annotations

import re

from distft.importers.options import Options

_RANK, _GAP = 128, 200  # transformers'
# LLaMA-Factory's scales (hparams/finetuning_args.py), and what of theirs must be as it is.
_SCALE = {"galore": 2.0, "apollo": 32.0}
_SAME = {"galore": {"proj_type": "std"}, "apollo": {"proj": "random", "proj_type": "std"}}


def layerwise(options: Options) -> str:
    """LLaMA-Factory: what says that a file is for one GPU."""
    for kind in _SCALE:
        if options.is_on(f"use_{kind}") and options.is_on(f"{kind}_layerwise"):
            return f"{kind}_layerwise runs on one GPU"
    return ""


def llama_factory(options: Options) -> None:
    """use_galore or use_apollo, which replace `optim`."""
    draft = options.draft
    kind = next((kind for kind in _SCALE if options.flag(f"use_{kind}")), None)
    if kind is None:
        return
    before = draft.fields.get("training.optim")
    if before != "adamw_torch" and not (before == "adamw_torch_fused" and not options.has("optim")):
        options.refuse("optim", f"distft's {kind} is on AdamW, with moments in float32")
    options.set("training.optim", f"use_{kind}", f"{kind}_adamw")
    if draft.fields.get("lora", True) is not None:
        options.refuse(f"use_{kind}", "it is for the model's own matrices")
    for name, field, usual in (("rank", "rank", 16), ("update_interval", "update_proj_gap", _GAP)):
        value = options.integer(f"{kind}_{name}")
        if value is not None:
            options.set(f"training.optim_args.{field}", f"{kind}_{name}", value)
        draft.default(f"training.optim_args.{field}", usual, f"{kind}_{name}")
    scale = options.number(f"{kind}_scale")
    if scale is not None:
        options.set("training.optim_args.scale", f"{kind}_scale", float(scale))
    draft.default("training.optim_args.scale", _SCALE[kind], f"{kind}_scale")
    if kind == "apollo" and (scale_type := options.text("apollo_scale_type")):
        options.set("training.optim_args.scale_type", "apollo_scale_type", scale_type)
    for name, same in _SAME[kind].items():
        if options.text(f"{kind}_{name}") not in (None, same):
            options.refuse(f"{kind}_{name}", f"distft has {same}")
    if options.flag("apollo_scale_front"):
        options.refuse("apollo_scale_front", "distft scales after the limit of growth")
    target = options.take(f"{kind}_target")
    names = [name.strip() for name in target.split(",")] if isinstance(target, str) else target
    if names and names != ["all"]:
        options.set("training.optim_target_modules", f"{kind}_target", names)
    elif names:
        options.drop(f"{kind}_target", "all-linear, distft's default")
    if options.flag(f"{kind}_layerwise"):
        # The hook of each weight steps and frees its gradient, before clipping sees one.
        options.set("training.max_grad_norm", f"{kind}_layerwise", 0.0)
        draft.warn(f"{kind}_layerwise: distft keeps all gradients until the step; the steps are the same")


def transformers(options: Options) -> None:
    """optim_args and optim_target_modules, where `optim` is one of these."""
    draft, optim = options.draft, options.draft.fields.get("training.optim")
    if optim not in ("galore_adamw", "apollo_adamw"):
        return
    given = options.take("optim_args") or {}
    if isinstance(given, str):
        given = dict(re.findall(r"([^\s,=]+)\s*=\s*([^\s,]+)", given))
    converted = {"rank": int, "update_proj_gap": int, "scale": float, "scale_type": str}
    found = {}
    for name, value in (given if isinstance(given, dict) else {"optim_args": given}).items():
        if name == "scale_type" and optim == "galore_adamw":
            options.refuse("optim_args", "galore_adamw has no scale_type")
        elif name in converted:
            try:
                found[name] = converted[name](value)
            except ValueError:
                options.refuse("optim_args", f"{name}: got {value}, need a number")
        elif (name, value) not in (("proj_type", "std"), ("proj", "random")):
            options.refuse("optim_args", f"distft has rank, update_proj_gap, scale and scale_type, not {name}: {value}")
    for name, value in ({"rank": _RANK, "update_proj_gap": _GAP} | found).items():
        if name in found:
            options.set(f"training.optim_args.{name}", "optim_args", value)
        else:
            draft.default(f"training.optim_args.{name}", value, "optim_args")
    _targets(options)
    if draft.fields.get("training.weight_decay"):
        draft.change("training.weight_decay", 0.0)
        draft.warn("training.weight_decay: 0, as transformers gives these optimizers none, whatever the file says")
    epsilon = draft.fields.get("trainer.overrides.adam_epsilon", 1e-8)
    if optim == "galore_adamw" and epsilon != 1e-6:
        draft.set("trainer.overrides.adam_epsilon", 1e-6, "optim (galore_torch's epsilon, whatever the file says)")


def _targets(options: Options) -> None:
    targets = options.take("optim_target_modules")
    names = [targets] if isinstance(targets, str) else targets
    if names in (["all-linear"], ["all_linear"]):
        options.set("training.optim_target_modules", "optim_target_modules", "all-linear")
        options.draft.warn("training.optim_target_modules: transformers' all-linear has the output layer, too; here it "
                           "has AdamW's whole moments")  # fmt: skip
    elif isinstance(targets, list) and targets and all(re.fullmatch(r"[\w.]+", str(name)) for name in targets):
        options.set("training.optim_target_modules", "optim_target_modules", targets)
    elif targets is None:
        options.draft.problems.append(f"optim_target_modules is missing ({options.draft.file.name})")
    else:
        options.refuse("optim_target_modules", "distft has all-linear, or a list of parts of names")
