"""Which rank this process is, how its node reaches the others, and what the ranks of a run decide together.

`placement` and `hosts` are pure, `network` and `open_files` look at the system, `groups` joins. Nothing is imported
here, so that all but the last can be used without torch.
"""
