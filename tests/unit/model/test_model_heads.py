import math

import numpy as np
import torch

from vitscale.model.heads import Classifier, PreLogits


def test_representation_layer_and_classifier_against_float64():
    torch.manual_seed(0)
    pre_logits, head = PreLogits(12, 20), Classifier(20, 5, bias_init=-10.0)
    torch.nn.init.normal_(head.weight)
    features = torch.randn(7, 12)
    w1, b1, w2, b2, x = (
        tensor.detach().double().numpy()
        for tensor in (pre_logits.fc.weight, pre_logits.fc.bias, head.weight, head.bias, features)
    )
    expected = np.tanh(x @ w1.T + b1) @ w2.T + b2
    np.testing.assert_allclose(head(pre_logits(features)).detach().numpy(), expected, rtol=0, atol=1e-5)


def test_classifier_starts_from_its_bias():
    head = Classifier(8, 3, bias_init=-10.0)
    assert torch.equal(head(torch.randn(4, 8)), torch.full((4, 3), -10.0))


def test_representation_layer_starts_lecun_normal():
    torch.manual_seed(0)
    fc = PreLogits(256, 512).fc
    # 131,072 draws: the relative error of the deviation is 1 / sqrt(2 n) = 0.2 %; five times that.
    assert abs(fc.weight.std().item() * math.sqrt(256) - 1) < 0.01
    assert fc.weight.abs().max().item() <= 2 / math.sqrt(256) / 0.8796
    assert torch.equal(fc.bias, torch.zeros(512))
