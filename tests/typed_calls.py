"""Calls that mypy must take or refuse, as `make check` finds out: no comment here may be unused."""

from pathlib import Path

import vissl_lite


def calls() -> None:
    """Never run."""
    result = vissl_lite.pretrain(data=[Path("photos")], out="run", epochs=100)
    vissl_lite.finetune(data="labelled", out=Path("tuned"), encoder=result)
    vissl_lite.pretrain(data="photos", out="run", epoch=100)  # type: ignore[call-arg]
    vissl_lite.pretrain(data="photos", out="run", epochs="x")  # type: ignore[arg-type]
    vissl_lite.probe(data="labelled", out="probed")  # type: ignore[call-arg]
