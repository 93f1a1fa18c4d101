"""Builders and checkers of shards: the command `vitscale-data`."""
