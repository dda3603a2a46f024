"""Self-supervised vision pre-training: one function per command, imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vissl_lite.commands.check import check
    from vissl_lite.commands.compare import compare
    from vissl_lite.commands.demo import demo
    from vissl_lite.commands.embed import embed
    from vissl_lite.commands.explore import explore
    from vissl_lite.commands.export import export
    from vissl_lite.commands.finetune import finetune
    from vissl_lite.commands.list import list_
    from vissl_lite.commands.predict import predict
    from vissl_lite.commands.pretrain import pretrain
    from vissl_lite.commands.probe import probe
    from vissl_lite.commands.pseudo_label import pseudo_label
    from vissl_lite.commands.report import report
    from vissl_lite.commands.runs import runs
    from vissl_lite.commands.select import select
    from vissl_lite.commands.shard import shard
    from vissl_lite.encoders.folder import load_encoder
    from vissl_lite.errors import UserError

__all__ = [
    "UserError",
    "check",
    "compare",
    "demo",
    "embed",
    "explore",
    "export",
    "finetune",
    "list_",
    "load_encoder",
    "predict",
    "pretrain",
    "probe",
    "pseudo_label",
    "report",
    "runs",
    "select",
    "shard",
]

# Importing torch takes seconds, and --version and --help do not need it: the imports above are for
# type checkers only, and each name is imported on first use.
_MODULES = {name: f"vissl_lite.commands.{name.rstrip('_')}" for name in __all__} | {
    "UserError": "vissl_lite.errors",
    "load_encoder": "vissl_lite.encoders.folder",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
