import pytest
import torch
from torch import nn

from mla_ext.multimodal.data import MultimodalData
from mla_ext.multimodal.encoders import ENCODERS, WIDTHS, build_encoder
from mla_ext.multimodal.evaluate import evaluate
from mla_ext.multimodal.fit import fit
from mla_ext.multimodal.recipe import Settings, build

SHAPES = {
    "small": [(7,), (1, 1), (8, 8), (32, 12), (64, 40), (3, 20, 9)],
    "resnet18": [(7,), (1, 1), (64, 40), (3, 20, 9)],
}


def make(name, shape, width):
    torch.manual_seed(0)
    return build_encoder(name, shape, width)


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in SHAPES.items() for shape in shapes])
def test_features(name, shape):
    encoder = make(name, shape, 48)
    for samples in (0, 1, 9):
        features = encoder(torch.randn(samples, *shape))
        assert features.shape == (samples, 48)
        assert (features >= 0).all()
    assert 0.2 < (features > 0).float().mean() < 0.8  # neither dead nor linear
    (features**2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize(("channels", "parameters"), [(3, 11_176_512), (1, 11_170_240), (9, 11_195_328)])
def test_resnet18_has_the_parameters_of_resnet18(channels, parameters):
    """Of torchvision's 11 689 512 without its classifier's 513 000; the first convolution has 3136 per channel."""
    encoder = make("resnet18", (channels, 32, 32), WIDTHS["resnet18"])
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert encoder(torch.randn(2, channels, 32, 32)).shape == (2, 512)
    widened = make("resnet18", (channels, 32, 32), 128)
    assert sum(p.numel() for p in widened.parameters()) == parameters + 513 * 128


def test_resnet18_halves_the_image_five_times():
    sizes = []
    encoder = make("resnet18", (3, 96, 70), 512)
    for layer in encoder:
        layer.register_forward_hook(lambda layer, inputs, output: sizes.append(tuple(output.shape[1:])))
    encoder(torch.randn(1, 3, 96, 70))
    assert sizes[0] == (64, 48, 35)
    assert sizes[3] == (64, 24, 18)
    blocks = [(64, 24, 18), (64, 24, 18), (128, 12, 9), (128, 12, 9), (256, 6, 5), (256, 6, 5), (512, 3, 3)]
    assert sizes[4:] == [*blocks, (512, 3, 3), (512, 1, 1), (512,)]


def test_resnet18_features_are_the_samples_own():
    """Neither the batch nor the mode changes them: a batch may hold one sample, and ranks may share a batch."""
    encoder = make("resnet18", (2, 33, 31), 512)
    x = torch.randn(3, 2, 33, 31)
    together = encoder(x)
    torch.testing.assert_close(torch.cat([encoder(sample[None]) for sample in x]), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.eval()(x), together, rtol=0, atol=0)
    assert not list(encoder.buffers())


def test_one_seed_one_encoder():
    first, second = (make("resnet18", (8, 8), 16).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    other = build_encoder("resnet18", (8, 8), 16).state_dict()
    assert not torch.equal(other["1.weight"], first["1.weight"])


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_get_the_same_layers(name):
    assert [type(layer) for layer in make(name, (5,), 8)] == [nn.Linear, nn.ReLU] * 2


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 2, 3, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="shape: expected"):
        build_encoder("small", shape, 8)


@pytest.mark.parametrize("width", [0, -1, 2.0, True])
def test_other_widths_are_refused(width):
    with pytest.raises(ValueError, match="width: expected a positive integer"):
        build_encoder("resnet18", (3, 3), width)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"encoder: expected one of \('small', 'resnet18'\), got 'vgg'"):
        build_encoder("vgg", (3, 3), 8)


@pytest.mark.parametrize("method", ["mla", "concat"])
def test_fit_with_resnet18_and_batches_of_one_sample(method):
    """All encoders give the head one width, and the mixed data trains: an image, a vector, a gap in it."""
    generator = torch.Generator().manual_seed(0)
    samples = 7
    rows = {"image": torch.arange(samples), "vector": torch.tensor([0, 1, -1, 3, 4, 5, 6])}
    features = {
        "image": torch.randn(samples, 3, 9, 8, generator=generator),
        "vector": torch.randn(samples, 4, generator=generator),
    }
    split = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    data = MultimodalData(("image", "vector"), features, rows, torch.arange(samples) % 2, ("a", "b"), split)
    model, optimizer = build(data, Settings(method=method, encoder="resnet18", width=512))
    assert model.head.in_features == (1024 if method == "concat" else 512)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (record,) = fit(model, optimizer, data, epochs=1, batch_size=1, progress=False)
    assert all(torch.tensor(list(record["training_loss"].values())).isfinite())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert 0 <= evaluate(model, data, "test").accuracy <= 1
