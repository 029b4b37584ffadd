import pytest
import torch
from torch import nn

from models.heads.daformer import DAFormerHead


def count(head):
    return sum(p.numel() for p in head.parameters())


def test_published_heads_have_the_published_number_of_parameters():
    assert count(DAFormerHead([128, 512, 512, 512], num_classes=11)) == 3_874_059
    assert count(DAFormerHead([128, 512, 512, 512], num_classes=9)) == 3_873_545
    assert count(DAFormerHead([256, 512, 1024, 2048], num_classes=19)) == 4_433_171


def test_widths_of_embedding_and_branches_are_options():
    head = DAFormerHead([4, 6], num_classes=3, embed_channels=5, channels=7)
    embed = 4 * 5 + 5 + 6 * 5 + 5
    branch = 10 * 7 + 14
    separable = 3 * (9 * 10 + 20 + branch)
    fuse = 28 * 7 * 9 + 14
    assert count(head) == embed + branch + separable + fuse + 7 * 3 + 3


def test_dilations_set_the_branches():
    head = DAFormerHead([4], num_classes=3, embed_channels=4, channels=4, dilations=(1, 2))
    convs = [m for m in head.aspp.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.dilation[0] for conv in convs] == [1, 2, 1]


def test_logits_have_the_size_of_the_first_feature_and_use_every_feature():
    head = DAFormerHead([4, 6, 8], num_classes=3, embed_channels=8, channels=8)
    sizes = ((4, 16, 24), (6, 8, 12), (8, 5, 3))
    features = [torch.randn(2, *size).requires_grad_(True) for size in sizes]
    logits = head(features)
    assert logits.shape == (2, 3, 16, 24)
    logits.square().mean().backward()
    assert all(feature.grad.abs().max() > 0 for feature in features)
    with pytest.raises(ValueError, match="shorter"):
        head(features[:2])


def test_the_classifier_keeps_pytorchs_start_or_draws_a_narrow_normal_one():
    torch.manual_seed(0)
    usual = DAFormerHead([4], num_classes=50).classifier
    narrow = DAFormerHead([4], num_classes=50, classifier_std=0.01).classifier
    assert usual.weight.abs().max() <= 256**-0.5 and usual.bias.abs().max() > 0
    assert narrow.weight.std().item() == pytest.approx(0.01, rel=0.05) and narrow.bias.abs().max() == 0


def test_convolutions_before_a_norm_have_no_bias_and_start_kaiming_normal():
    torch.manual_seed(0)
    head = DAFormerHead([8], num_classes=3)
    convs = [m for m in [*head.aspp.modules(), *head.fuse.modules()] if isinstance(m, nn.Conv2d)]
    assert len(convs) == 8 and all(conv.bias is None for conv in convs)
    assert head.fuse[0].weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


def test_dropout_acts_on_whole_channels_in_training_only():
    head = DAFormerHead([4], num_classes=3, embed_channels=8, channels=8, dropout=0.5)
    features = [torch.randn(1, 4, 8, 8)]
    head.eval()
    assert torch.equal(head(features), head(features))
    for module in head.modules():  # so that only the dropout differs between the modes
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    head.train()
    torch.manual_seed(0)
    assert not torch.equal(head(features), head(features))
    head.dropout.p = 0.0
    assert torch.equal(head(features), head(features))
