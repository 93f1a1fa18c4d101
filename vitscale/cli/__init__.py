"""The `vitscale` command."""

from vitscale.cli.main import main

__all__ = ["main"]
