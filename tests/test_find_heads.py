"""Heads by the pattern of their names."""

import pytest
from torch import nn

from mla_ext import ProjectedSGD, find_heads


def model():
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    heads = nn.ModuleDict(
        {"image": nn.Linear(4, 2), "text": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))}
    )
    return nn.ModuleDict({"encoder": encoder, "heads": heads})


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"heads\.image", ["heads.image"]),
        (r"heads\.text", ["heads.text.0", "heads.text.2"]),  # a module stands for the layers in it
        (r"heads\.text\.2|heads\.image", ["heads.image", "heads.text.2"]),
        (r"heads|heads\.text", ["heads.image", "heads.text.0", "heads.text.2"]),  # each once
        ("", ["encoder.0", "heads.image", "heads.text.0", "heads.text.2"]),  # the name of the whole model
        (".*", ["encoder.0", "heads.image", "heads.text.0", "heads.text.2"]),
    ],
)
def test_the_whole_name_matches(pattern, names):
    whole = model()
    found = find_heads(whole, pattern)
    assert [id(layer) for layer in found] == [id(whole.get_submodule(name)) for name in names]
    optimizer = ProjectedSGD(whole.parameters(), heads=found)
    assert all(optimizer.projection(layer.weight) is not None for layer in found)


@pytest.mark.parametrize("pattern", ["head", "image", r"encoder\.1"])
def test_a_pattern_that_names_no_layer_is_said_with_the_names_there_are(pattern):
    with pytest.raises(ValueError, match=r"pattern: .*'heads.text.2'.*, got "):
        find_heads(model(), pattern)


def test_what_is_no_pattern():
    with pytest.raises(ValueError, match=r"pattern: expected a regular expression, got '\('"):
        find_heads(model(), "(")
    with pytest.raises(TypeError, match=r"pattern: expected a str, got NoneType None"):
        find_heads(model(), None)
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got list \[\]"):
        find_heads([], "head")
