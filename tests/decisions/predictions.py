"""Predictions of made-up classifiers and regressions, whose data are drawn with what they say or something else."""

import torch
from torch.distributions import Categorical

from bnnify.prediction import Prediction


def of_classes(number, classes=5, sharpness=2.0, told=1.0):
    """A prediction that is ``told`` times as sure, in logits, as the distribution of the labels is."""
    logits = sharpness * torch.randn(number, classes)
    labels = Categorical(logits=logits).sample()
    return classified((told * logits).softmax(-1)), labels


def classified(probabilities, class_dim=-1):
    entropy = torch.special.entr(probabilities).sum(class_dim)
    return Prediction(probabilities, torch.zeros_like(probabilities), 1, entropy, entropy, class_dim=class_dim)


def answered(yes):
    entropy = torch.special.entr(yes) + torch.special.entr(1 - yes)
    return Prediction(yes, torch.zeros_like(yes), 1, entropy, entropy)


def of_numbers(number, told=1.0, known=True):
    """A regression whose noise differs from input to input, and which says ``told`` times the true one."""
    mean, noise = torch.randn(number), torch.rand(number) + 0.1
    y = mean + noise * torch.randn(number)
    return Prediction(mean, torch.zeros(number), 1, aleatoric_std=told * noise if known else None), y
