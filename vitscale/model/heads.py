"""What follows the trunk: the representation layer and the classifier.

Like the trunk's modules, each sets its own parameters while it is built.
"""

import torch
from torch import Tensor, nn

from vitscale.model.blocks import lecun_normal_


class RepresentationLinear(nn.Linear):
    """The linear part of the representation layer."""

    def reset_parameters(self) -> None:
        """LeCun normal weight, zero bias."""
        lecun_normal_(self.weight)
        nn.init.zeros_(self.bias)


class PreLogits(nn.Module):
    """The representation layer of the ViT paper's pretraining head: [B, D] -> tanh(linear) [B, representation_size]."""

    def __init__(self, embed_dim: int, representation_size: int) -> None:
        super().__init__()
        self.fc = RepresentationLinear(embed_dim, representation_size)

    def forward(self, features: Tensor) -> Tensor:
        """The representation, within -1 and 1."""
        return torch.tanh(self.fc(features))


class Classifier(nn.Linear):
    """Linear classifier that starts from zero weights, so that every first logit is `bias_init`."""

    def __init__(self, in_features: int, num_classes: int, bias_init: float) -> None:
        super().__init__(in_features, num_classes)
        nn.init.constant_(self.bias, bias_init)

    def reset_parameters(self) -> None:
        """Zero weight and bias."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
