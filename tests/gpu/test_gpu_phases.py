"""The phases that are about correctness, as tests: `make test-all` runs them where there is a GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="needs Unsloth"),
]
sys.path.insert(0, str(Path(__file__).parent))


@pytest.mark.parametrize("name", ["environment", "adapters", "logps", "merged", "precision", "flex"])
def test_on_this_gpu(name, tmp_path):
    # covers U2 U3 U4 U11
    import time

    import suite

    (phase,) = [phase for phase in suite.PHASES if phase.name == name]
    variables, until = suite.environment("cuda", None), time.monotonic() + 600
    process, limit = suite.start(phase, "cuda", "tiny", tmp_path, variables, until)
    found = suite.finish(phase, process, limit, tmp_path)
    assert found["status"] == "ok", found
