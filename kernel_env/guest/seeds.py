"""The seed of an episode.

Runs inside the kernel, on the standard library alone.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import random
import sys
from typing import Any


class _SeedNumpy(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Seeds numpy's global generator when `numpy.random` is imported, however late."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._loader: Any = None

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "numpy.random" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        module.seed(self._seed)


def seed_generators(seed: int) -> None:
    """Seed `random` and numpy's global generator, now or when numpy comes."""
    random.seed(seed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(seed % 2**32)
    else:
        sys.meta_path.insert(0, _SeedNumpy(seed % 2**32))
