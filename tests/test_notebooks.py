"""Notebooks run from top to bottom, here with the small numbers below in their first code cell."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

SMALL = {
    "choose_and_label": """
images, test = 100, 20
budget = 30
minutes = 0.05
epochs = 1
""",
    "pretrain_probe_finetune": """
images, shots = 64, 2
train, val, test = 60, 40, 60
minutes = 0.05
epochs = 1
""",
    "read_a_comparison": """
images, shots = 64, [2]
train, val, test = 60, 40, 60
minutes = 0.05
""",
    "three_transfers": """
unlabelled, train, val, test = 64, 40, 20, 20
minutes = 0.05
epochs = {"classification": 1, "detection": 1, "segmentation": 1}
""",
}


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    given = {line.split(" = ")[0] for line in cell.source.splitlines()}
    assert given == {line.split(" = ")[0] for line in SMALL[name].strip().splitlines()}
    cell.source = SMALL[name]
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")  # else a warning in every run
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    done = client.execute()
    pictures = [
        output
        for cell in done.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_holds_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not [
        cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")
    ]
