"""Checkpoints that DeepSpeed itself wrote, read without DeepSpeed, without an engine and without executing anything."""

from vitscale.checkpoint.deepspeed_files.contents import MOMENTS, Contents, Maker, read_deepspeed
from vitscale.checkpoint.deepspeed_files.folder import is_deepspeed, locate_tag

__all__ = ["MOMENTS", "Contents", "Maker", "is_deepspeed", "locate_tag", "read_deepspeed"]
