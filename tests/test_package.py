"""The package as a stranger gets it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vissl_lite

ROOT = Path(__file__).parents[1]


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, vissl_lite; vissl_lite.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_functions_are_all_there() -> None:
    for name in vissl_lite.__all__:
        assert getattr(vissl_lite, name).__doc__
        assert name in dir(vissl_lite)


@pytest.mark.slow
def test_a_wheel_holds_every_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    needed = [*(ROOT / "vissl_lite").rglob("*.py"), *(ROOT / "vissl_lite").rglob("*.jinja")]
    assert {str(path.relative_to(ROOT)) for path in needed} <= inside
    assert not [name for name in inside if name.startswith(("tests", "benchmarks"))]
