"""Importing the package changes nothing outside it."""

import json
import subprocess
import sys

import pytest

# Libraries do things of their own when they are imported: that is not ours to answer for.
PROGRAM = """
import importlib, json, logging, os, pkgutil, signal, sys, warnings

import bokeh, cv2, huggingface_hub, jinja2, lightning.pytorch, matplotlib.figure
import numpy, PIL.Image, PIL.ImageFile, rich, scipy, sklearn, timm, torch, torchmetrics, torchvision

theirs = list(logging.root.manager.loggerDict)

def state():
    hub = huggingface_hub.constants
    ours = [name for name in logging.root.manager.loggerDict if name.startswith("vissl_lite")]
    loggers = [logging.getLogger(name) for name in (None, *theirs, *ours)]
    return {
        "environment": dict(os.environ),
        "loggers": {
            one.name: [one.level, one.propagate, one.disabled, list(map(repr, one.handlers))]
            for one in loggers
            # a logger that is merely there does nothing
            if one.handlers or one.level or one.disabled or not one.propagate
        },
        "warnings": [[one[0], repr(one[1]), repr(one[2])] for one in warnings.filters],
        "cv2": [cv2.getNumThreads(), cv2.utils.logging.getLogLevel(), cv2.useOptimized()],
        "torch": [
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled(),
            torch.backends.mha.get_fastpath_enabled(), torch.random.initial_seed(),
        ],
        "PIL": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES],
        "hub": {n: getattr(hub, n) for n in dir(hub) if n.startswith("HF_")},
        "matplotlib": {n: v for n, v in matplotlib.rcParams.items() if n != "backend"},
        "signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
        "hooks": [sys.excepthook, sys.displayhook],
    }

torch.manual_seed(5)
before = state()
import vissl_lite
for module in pkgutil.walk_packages(vissl_lite.__path__, "vissl_lite."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
after = state()
print(json.dumps({
    name: sorted(
        f"{key}: {before[name].get(key)} -> {after[name].get(key)}"
        for key in {*before[name], *after[name]} if before[name].get(key) != after[name].get(key)
    ) if isinstance(before[name], dict) else [repr(before[name]), repr(after[name])]
    for name in before if before[name] != after[name]
}))
"""


@pytest.mark.slow
def test_importing_everything_changes_nothing_outside() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
