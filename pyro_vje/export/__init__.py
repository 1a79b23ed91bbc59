"""One file that runs without the package."""

from pyro_vje.export.deploy import ExportResult, export

__all__ = [
    "ExportResult",
    "export",
]
