"""The table of tasks."""

import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vissl_lite.errors import UserError, canonical_name
from vissl_lite.options import Options
from vissl_lite.transfer.base import Task
from vissl_lite.transfer.classification.task import Classification
from vissl_lite.transfer.detection.task import Detection
from vissl_lite.transfer.finetuning import HEAD, TransferSettings, model_folder, read_head
from vissl_lite.transfer.segmentation.task import Segmentation

# A task of any types of data, models and settings.
AnyTask = Task[Any, Any, Any, Any]

TASKS: dict[str, AnyTask] = {
    "classification": Classification(),
    "detection": Detection(),
    "segmentation": Segmentation(),
}

# All options that only some tasks have, for commands that work with any task.
if TYPE_CHECKING:
    from vissl_lite.transfer.options import TaskOptions

    class AllTaskOptions(TaskOptions):
        """All options that only some tasks have."""

else:
    AllTaskOptions = types.new_class(
        "AllTaskOptions", tuple(task.options for task in TASKS.values())
    )


def find_task(name: str) -> AnyTask:
    """A task by its name, in any case.

    Raises:
        UserError: There is none of this name.
    """
    name = canonical_name(name, TASKS)
    if name not in TASKS:
        raise UserError(f"--task {name} is none of {', '.join(TASKS)}")
    return TASKS[name]


def check_given(task: AnyTask, given: Mapping[str, Any]) -> None:
    """Raise a UserError for options that belong to other tasks.

    Args:
        task: Task that was chosen.
        given: Values by the names of options; None takes an option back.
    """
    for name, value in given.items():
        owners = _owners(name)
        if value is not None and owners and task.name not in owners:
            raise UserError(f"--{name} is for --task {' or '.join(owners)}, not for {task.name}")


def reading_settings(task: AnyTask, options: Options) -> TransferSettings:
    """Settings for reading labels, of a command that does not train.

    Args:
        task: Task of the labels.
        options: Has options for reading labels among its attributes.

    Raises:
        UserError: An option belongs to another task.
    """
    check_given(task, options.given)
    names = {one.name for one in fields(task.settings)} & {one.name for one in fields(options)}
    settings: TransferSettings = task.settings(**{one: getattr(options, one) for one in names})
    return settings


def without_others(task: AnyTask, config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove options that only other tasks have."""
    return {n: value for n, value in config.items() if task.name in (_owners(n) or [task.name])}


def _owners(option: str) -> list[str]:
    """The tasks that have an option; empty for an option of all tasks."""
    return [one.name for one in TASKS.values() if option in _own_options(one)]


def _own_options(task: AnyTask) -> set[str]:
    shots = {"shots"} if task.takes_shots else set()
    return {field.name for field in fields(task.options)} | shots


def find_model(source: Path) -> tuple[AnyTask, Path]:
    """The task of a fine-tuned model, and the model folder.

    Args:
        source: A run of ``finetune``, or the ``model`` folder in it.

    Raises:
        UserError: There is no model, or it is damaged.
    """
    folder = model_folder(source)
    head = read_head(folder)
    if head is None:
        return TASKS["classification"], folder  # a timm model with classes
    if head["task"] not in TASKS:
        raise UserError(f"{folder / HEAD} is damaged: its task is none of {', '.join(TASKS)}")
    return TASKS[head["task"]], folder
