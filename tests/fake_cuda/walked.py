"""Which of distft's decisions about GPUs were taken by processes that see the emulated ones.

A decision is a comparison with CUDA, NCCL or a GPU's facts, a call of torch.cuda.is_available, or the test of an `if`
that asks for `gpus`. Each writes down its place when it is taken (sitecustomize.py).
"""

from __future__ import annotations

import ast
import builtins
import importlib.machinery
import os
import re
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

FACTS = re.compile(r"'cuda'|'nccl'|nvidia-smi|NVIDIA|CUDA|capability")
ASKED = "torch.cuda.is_available()"
# These read and write files about other machines.
ELSEWHERE = ("distft/importers/", "distft/schedulers/", "distft/commands/import_recipe.py")


def decisions(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if (isinstance(node, ast.Compare) and FACTS.search(ast.unparse(node))) or (
            isinstance(node, ast.Call) and ast.unparse(node) == ASKED
        ):
            yield node
        elif isinstance(node, ast.If | ast.IfExp) and re.search(r"\bgpus\b", ast.unparse(node.test)):
            yield node.test


def all_decisions(package: Path) -> set[str]:
    """path:line of every decision below a package's folder."""
    files = {file.relative_to(package.parent).as_posix(): file for file in package.rglob("*.py")}
    return {
        f"{name}:{node.lineno}"
        for name, file in files.items()
        if not name.startswith(ELSEWHERE)
        for node in decisions(ast.parse(file.read_text()))
    }


def as_on_gpu(node: ast.expr) -> bool | None:
    """What a decision gives where there is a GPU; None where both may be."""
    if isinstance(node, ast.Compare) and re.search(r"'cuda'|'nccl'", ast.unparse(node)):
        return {ast.Eq: True, ast.NotEq: False}.get(type(node.ops[0]))
    return True if ast.unparse(node) == ASKED else None


def taken(place: str, value: Any, as_on_gpu: bool | None = None) -> Any:
    """The value, written down unless it is not what a GPU gives (`as_on_gpu`, where that is known)."""
    if as_on_gpu is not None and bool(value) is not as_on_gpu:
        return value
    with open(os.environ["FAKE_CUDA"] + "/decisions", "a") as file:
        file.write(place + "\n")
    return value


builtins.__taken__ = taken  # type: ignore[attr-defined]  # the modules find it there, also one that runpy runs


class _Recorded(ast.NodeTransformer):
    def __init__(self, tree: ast.AST, name: str):
        self.wanted, self.name = {id(node) for node in decisions(tree)}, name

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, ast.expr) or id(node) not in self.wanted:
            return self.generic_visit(node)
        told = [ast.Constant(f"{self.name}:{node.lineno}"), self.generic_visit(node), ast.Constant(as_on_gpu(node))]
        return ast.copy_location(ast.Call(ast.Name("__taken__", ast.Load()), told, []), node)


class Loader(SourceFileLoader):
    """Compiles a module so that its decisions write down their place. Nothing is cached."""

    def path_stats(self, path: Any) -> Any:
        raise OSError("not cached")

    def source_to_code(self, data: Any, path: Any, **options: Any) -> Any:  # type: ignore[override]
        tree = ast.parse(data)
        name = str(path)[str(path).rindex("distft/") :] if "distft/" in str(path) else str(path)
        tree = _Recorded(tree, name).visit(tree)
        return compile(ast.fix_missing_locations(tree), path, "exec")


class Finder:
    """Finds distft's modules for Loader."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "distft":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(name, spec.origin)
        return spec
