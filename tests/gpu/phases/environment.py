"""The machine and the versions: what every figure depends on."""

import importlib.metadata
import platform
import subprocess

from common import Record, Settings, run

PACKAGES = (
    "torch torchvision transformers trl peft accelerate datasets bitsandbytes unsloth unsloth_zoo xformers triton"
)


def environment(settings: Settings, record: Record) -> None:
    import torch

    import vlm_grpo

    versions = {"python": platform.python_version(), "vlm_grpo": vlm_grpo.__version__}
    for name in PACKAGES.split():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    record.put(versions=versions, cuda=torch.version.cuda)
    if settings.on_gpu:
        card = torch.cuda.get_device_properties(0)
        record.put(
            gpu=card.name,
            memory_gib=card.total_memory / 2**30,
            capability=f"{card.major}.{card.minor}",
            driver=_driver(),
            bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        )
    else:
        record.put(gpu="cpu")
    from vlm_grpo.models.unsloth import why_not

    reason = why_not()
    record.put(unsloth=reason or "works")
    record.check("Unsloth works", not reason)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().partition("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


if __name__ == "__main__":
    run(environment)
