"""Every kind of block and every stem of the backbones is exported, and agrees; ResNet-18 is in the other files."""

import pytest
import torch
from networks import small_network

from export.core import core_model
from export.parity import session


@pytest.mark.parametrize(
    "backbone",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet34", "resnet50s", "resnet101c")],
)
def test_backbone(backbone: str) -> None:
    network = small_network(backbone=backbone)
    model = core_model(network)
    image = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(image)
    logits, presence = session(model.SerializeToString()).run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(presence), expected.presence_logits, rtol=0, atol=1e-3)
    assert 1 < float(expected.logits.abs().max()) < 100
