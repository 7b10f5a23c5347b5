"""``python -m vlm_grpo`` is ``vlm-grpo``."""

from .cli import main

main()
