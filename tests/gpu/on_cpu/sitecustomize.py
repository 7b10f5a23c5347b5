"""Read by Python at its start where this folder is on its path: Unsloth on a CPU, with TRL's trainers replaced.

On a GPU its import replaces them. On a CPU it does so only when asked.
"""

import builtins
import os
import runpy
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[2] / "unsloth_on_cpu" / "sitecustomize.py"))
_import = builtins.__import__


def _and_replace(name, *args, **kwargs):
    module = _import(name, *args, **kwargs)
    whole = sys.modules.get("unsloth")
    if whole is not None and hasattr(whole, "FastVisionModel") and hasattr(whole, "__file__"):
        builtins.__import__ = _import
        os.environ["UNSLOTH_ALLOW_CPU"] = "0"
        try:
            from unsloth.models.rl import PatchFastRL

            PatchFastRL(FastLanguageModel=whole.FastVisionModel)
        finally:
            os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    return module


builtins.__import__ = _and_replace
