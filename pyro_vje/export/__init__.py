"""One file that runs without the package."""

import sys
from types import ModuleType
from typing import Any

from pyro_vje.export.deploy import ExportResult, export

__all__ = ["ExportResult", "export"]


class _Callable(ModuleType):
    """This folder has the name of its function, which `pyro_vje` offers: whichever is meant, it can be called."""

    def __call__(self, *arguments: Any, **settings: Any) -> ExportResult:
        return export(*arguments, **settings)


sys.modules[__name__].__class__ = _Callable
