"""Every loss as its definition reads: loops over images and classes in float64. And the batches to try them on."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from vitscale.losses import Targets

# (images, classes, scale of the logits, seed, whether images are mixed)
batches = st.tuples(
    st.integers(1, 6), st.integers(1, 9), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 2**31), st.booleans()
)


def draw(images, classes, scale, seed, mixed=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, classes, generator=generator, dtype=dtype)
    labels, partners = torch.randint(classes, (2, images), generator=generator)
    if not mixed:
        return logits, Targets(labels)
    return logits, Targets(labels, partners, torch.rand(images, generator=generator))


def wanted(targets, image, classes, smoothing):
    """Each class's target for one image."""
    label, weight = int(targets.labels[image]), 1.0
    probabilities = [smoothing / classes] * classes
    if targets.weights is not None:
        weight = float(targets.weights[image])
        probabilities[int(targets.partner_labels[image])] += (1 - smoothing) * (1 - weight)
    probabilities[label] += (1 - smoothing) * weight
    return probabilities


def log_softmax(logits):
    top = max(logits)
    log_sum = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - log_sum for z in logits]


def log_sigmoid(z):
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def softmax_loop(logits, targets, smoothing=0.0):
    total = 0.0
    for image, of_image in enumerate(logits.double().tolist()):
        probabilities = wanted(targets, image, len(of_image), smoothing)
        total -= sum(t * log_p for t, log_p in zip(probabilities, log_softmax(of_image), strict=True))
    return total / len(logits)


def sigmoid_loop(logits, targets, smoothing=0.0):
    total = 0.0
    for image, of_image in enumerate(logits.double().tolist()):
        for t, z in zip(wanted(targets, image, len(of_image), smoothing), of_image, strict=True):
            total -= t * log_sigmoid(z) + (1 - t) * log_sigmoid(-z)
    return total / len(logits)


def semantic_loop(logits, targets, line, smoothing=0.0, largest_weight=20.0):
    """Level by level, image by image, label by label."""
    classes, levels = line.shape
    own_level = [max(level for level in range(levels) if line[c, level] >= 0) for c in range(classes)]
    total = 0.0
    for level in range(levels):
        here = [c for c in range(classes) if own_level[c] == level]
        reaching = sum(own_level[c] >= level for c in range(classes))
        weight = min(classes / reaching, largest_weight)
        for image, of_image in enumerate(logits.double().tolist()):
            log_p = dict(zip(here, log_softmax([of_image[c] for c in here]), strict=True))
            shares = [(int(targets.labels[image]), 1.0)]
            if targets.weights is not None:
                share = float(targets.weights[image])
                shares = [(int(targets.labels[image]), share), (int(targets.partner_labels[image]), 1 - share)]
            for label, share in shares:
                ancestor = line[label, level]
                if ancestor < 0:
                    continue
                total -= weight * share * (1 - smoothing) * log_p[ancestor]
                total -= weight * share * smoothing / len(here) * sum(log_p.values())
    return total / len(logits)


def soft_teacher_loop(logits, teacher_logits, tau):
    total = 0.0
    for of_student, of_teacher in zip(logits.double().tolist(), teacher_logits.double().tolist(), strict=True):
        log_p = log_softmax([z / tau for z in of_student])
        log_q = log_softmax([z / tau for z in of_teacher])
        total += tau**2 * sum(math.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True))
    return total / len(logits)


def draw_line(classes, seed):
    """A random tree over the classes, as `Hierarchy.line`."""
    random = np.random.default_rng(seed)
    parent = [-1] + [int(random.integers(-1, c)) for c in range(1, classes)]
    paths = []
    for c in range(classes):
        paths.append([*(paths[parent[c]] if parent[c] >= 0 else []), c])
    levels = max(map(len, paths))
    line = np.array([path + [-1] * (levels - len(path)) for path in paths], dtype=np.int32)
    shuffled = random.permutation(classes)  # so that a parent's label may be the larger one
    there = np.empty(classes, dtype=np.int32)
    there[shuffled] = np.arange(classes)
    return np.where(line >= 0, shuffled[line], -1)[there].astype(np.int32)
