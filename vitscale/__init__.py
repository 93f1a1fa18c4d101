"""vitscale: pretrain huge, giant and gigantic Vision Transformers on ImageNet-21k.

The public names are loaded when they are first used, so that importing vitscale does not import torch.
"""

import importlib
from typing import Any

_PUBLIC = {
    "Config": "vitscale.config",
    "load_config": "vitscale.config",
    "create_model": "vitscale.model",
    "VisionTransformer": "vitscale.model",
    "export_model": "vitscale.checkpoint",
    "load_pretrained": "vitscale.checkpoint",
    "read_portable": "vitscale.checkpoint",
    "write_portable": "vitscale.checkpoint",
    "run_training": "vitscale.train.run",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitscale' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
