"""Loggers in addition to ``metrics.csv``, from Lightning."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger

from vissl_lite.errors import UserError, canonical_name, did_you_mean

# By the name of their package.
LOGGERS = ("tensorboard", "wandb", "mlflow")
NAMES = (*LOGGERS, "none")


def canonical_loggers(given: Sequence[str] | str) -> list[str]:
    """Names of loggers as in ``NAMES``, from names in any case; unknown ones stay as they are."""
    return [canonical_name(name, NAMES) for name in ([given] if isinstance(given, str) else given)]


def logger_names(given: Sequence[str] | str | None) -> list[str]:
    """Names of the loggers to use, without importing them.

    Args:
        given: Names of ``LOGGERS``, or ``none``; None for TensorBoard where it is installed.

    Raises:
        UserError: A name is unknown, or its package is not installed.
    """
    if given is None:
        return ["tensorboard"] if find_spec("tensorboard") else []
    names = list(dict.fromkeys(canonical_loggers(given)))
    for name in names:
        if name not in NAMES:
            raise UserError(f"unknown --logger {name}: {did_you_mean(name, NAMES)}")
        if name != "none" and find_spec(name) is None:
            raise UserError(f"--logger {name} needs a package that is missing: pip install {name}")
    if "none" in names:
        if len(names) > 1:
            raise UserError(f"--logger {' '.join(names)} contradicts itself: none stands alone")
        return []
    return names


def make_loggers(names: Sequence[str], run: Path) -> list[Logger]:
    """Build loggers that write into the run.

    Weights & Biases and MLflow send to where their own environment variables say, else MLflow
    writes into the run, too.

    Args:
        names: Names of ``logger_names``.
        run: Run folder; its name is the name of the run.
    """
    # here, as each import is for those alone who use it
    from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

    made: list[Logger] = []
    if "tensorboard" in names:
        made.append(TensorBoardLogger(run, name="", version="tensorboard"))
    if "wandb" in names:
        made.append(WandbLogger(name=run.absolute().name, save_dir=run, project="vissl-lite"))
    if "mlflow" in names:
        made.append(MLFlowLogger("vissl-lite", run.absolute().name, save_dir=str(run / "mlruns")))
    return made
