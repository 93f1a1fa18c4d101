"""The trainer: from a config to a finished, resumable run.

Nothing is imported here, so that what needs no torch (the records of a run directory, the decisions of a preflight)
can be used without it.
"""
