"""The preflight: what every node and rank of a job finds out about itself, and which nodes are taken for the run.

reports   the files that nodes and ranks leave for the choice
pairs     who talks to whom in the network check, and how its figures are read: pure
rules     what the reports say against a node: pure
choice    which nodes are sound, and which of them the run gets: pure

node, disks        what a node looks at: versions and devices, its way to the data, its disks and its clock
measure            how fast a device multiplies, and how fast ranks talk
meeting, talking   a rank's way through it all, bounded at every step (seat, gates)

The first four need no torch: the choice is made on the batch host, before anything has started.
"""
