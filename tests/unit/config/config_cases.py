"""The smallest tree that is a config."""

import copy

MINIMAL = {
    "model": {"name": "vit_tiny_patch16_224", "num_classes": 8},
    "data": {"train": {"path": "data/digits", "split": "train"}},
    "batch": {"global_batch": 64, "micro_batch": 8},
    "optim": {"peak_lr": 0.001},
    "schedule": {"length": 100},
}


def changed(**sections):
    tree = copy.deepcopy(MINIMAL)
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return tree
