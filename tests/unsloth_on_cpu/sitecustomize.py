"""Read by Python at its start where this folder is on its path: what Unsloth asks a GPU's driver for."""

import types

import torch

_CARD = dict(name="none", total_memory=8 << 30, major=8, minor=0, multi_processor_count=1, warp_size=32)
_CARD |= dict(max_threads_per_multi_processor=2048, gcnArchName="", shared_memory_per_block_optin=101376)
_CARD |= dict(shared_memory_per_block=49152, regs_per_multiprocessor=65536, L2_cache_size=1 << 20, is_integrated=0)
torch.cuda.get_device_properties = lambda *args, **kwargs: types.SimpleNamespace(**_CARD)
