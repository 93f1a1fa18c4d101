"""Which rank this process is, how its node reaches the others, and what the ranks of a run decide together.

`placement` and `hosts` are pure, `network` decides and looks, `groups` joins. Nothing is imported here, so that the
first three can be used without torch.
"""
