"""Changing a module right after a user's script imports it.

Importing it before the script does would change the script: some packages must come first, some variables are read on
import, and a script that needs no torch would wait for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Action = Callable[[Any], None]


class AfterImport(MetaPathFinder):
    """Calls an action with a module, once it was executed; at once for one that is there already."""

    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}
        sys.meta_path.insert(0, self)

    def add(self, name: str, action: Action) -> None:
        """Call `action` with the module `name`. One action a module."""
        if name in sys.modules:
            action(sys.modules[name])
        else:
            self.actions[name] = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = self.actions.pop(fullname, None)
        spec = PathFinder.find_spec(fullname, path, target) if action else None
        loader: Any = spec and spec.loader  # Any: methods are not to be assigned to
        if loader is None or action is None:
            return None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            action(module)

        loader.exec_module = exec_module
        return spec
