import torch
import torch.nn.functional as F

from functional.losses import pixel_cross_entropy
from models.few_shot.pspnet import PSPNet
from models.few_shot.resnet import ResNet, normalize
from models.few_shot.vgg import VGG16


def tiny(**options):
    torch.manual_seed(0)
    backbone = ResNet((1, 1, 2, 1), (2, 4, 4, 8), deep_stem=True, dilated=True)
    return PSPNet(backbone, **{"num_classes": 5, "channels": 8} | options)


def test_logits_have_the_images_size_and_corners_of_those_at_the_features_size():
    network, image = tiny().eval(), torch.rand(2, 3, 65, 49)
    logits = network(image)
    coarse = network.logits_of(network.backbone.stages(normalize(image))[-1])
    assert (logits.shape, coarse.shape) == ((2, 5, 65, 49), (2, 5, 9, 7))
    torch.testing.assert_close(
        logits[:, :, ::8, ::8], coarse
    )  # align_corners: every 8th pixel is one of them


def test_the_published_network_has_the_published_widths():
    for backbone, part, total in (
        (lambda: ResNet(deep_stem=True, dilated=True), 512, 4096),
        (lambda: VGG16(batch_norm=True), 128, 1024),
    ):
        with torch.device("meta"):
            network, image = PSPNet(backbone(), 16), torch.empty(2, 3, 473, 473)
        assert [tuple(pool[1].weight.shape) for pool in network.ppm] == [(part, total // 2, 1, 1)] * 4
        assert tuple(network.cls[0].weight.shape) == (512, total, 3, 3)
        assert network(image).shape == (2, 16, 473, 473)
        assert network.cls[0].bias is None and network.cls[4].bias is not None


def test_each_bin_averages_its_part_of_the_map_and_adds_its_channels():
    network = tiny(bins=(2,)).eval()
    seen = []
    network.cls.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = torch.rand(1, 32, 4, 4)
    network.logits_of(features)
    pool = network.ppm[0]
    means = features.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    expected = F.interpolate(
        pool[3](pool[2](pool[1](means))), size=(4, 4), mode="bilinear", align_corners=True
    )
    torch.testing.assert_close(seen[0], torch.cat([features, expected], 1))
    assert [pool[1].weight.shape[0] for pool in tiny(bins=(1, 2, 3, 6)).ppm] == [8] * 4


def test_all_of_it_learns_and_training_lowers_the_loss():
    network = tiny(dropout=0.0).train()
    image = torch.rand(2, 3, 33, 33)
    label = (image[:, 0] > 0.5).long() * 3
    label[:, :4] = 255
    optimizer, losses = torch.optim.Adam(network.parameters(), 1e-2), []
    for _ in range(8):
        loss = pixel_cross_entropy(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_and_channels_change_the_head():
    features = torch.rand(2, 32, 4, 4)
    kept, dropped = tiny(dropout=0.0), tiny(dropout=0.5)
    torch.testing.assert_close(kept.logits_of(features), kept.logits_of(features))
    assert not torch.equal(dropped.logits_of(features), dropped.logits_of(features))
    assert tiny(channels=6).cls[4].weight.shape == (5, 6, 1, 1)


def test_images_are_normalised_before_the_backbone():
    network, seen = tiny().eval(), []
    network.backbone.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 3, 17, 17)
    network(image)
    torch.testing.assert_close(seen[0], normalize(image))


def test_a_frozen_backbone_keeps_weights_and_statistics_and_takes_no_gradient():
    network = PSPNet(ResNet((1, 1, 1, 1), (4, 4, 8, 8)), num_classes=3, channels=8, frozen_backbone=True)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.train()(torch.rand(2, 3, 64, 64)).sum().backward()
    after = network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("backbone."))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("ppm."))  # statistics
    assert {k.split(".")[0] for k, p in network.named_parameters() if p.grad is not None} == {"ppm", "cls"}
    free = PSPNet(ResNet((1, 1, 1, 1), (4, 4, 8, 8)), num_classes=3, channels=8).train()
    assert free.backbone.training and all(p.requires_grad for p in free.parameters())
