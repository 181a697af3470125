"""Encoders of torchvision and transformers: small ones, with random weights. Nothing is downloaded."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mla_ext.multimodal import cli, library
from mla_ext.multimodal.data import MultimodalData
from mla_ext.multimodal.encoders import build_encoder, default_width
from mla_ext.multimodal.fit import fit
from mla_ext.multimodal.recipe import Settings, build, standardized

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # the libraries' own


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")


vision, text = needs("torchvision"), needs("transformers")
RESNET = "torchvision:shufflenet_v2_x0_5"  # the smallest: 1024 features, 0.3 million parameters


def save_bert(folder, seed=0, hidden=16):
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=50, hidden_size=hidden, max_position_embeddings=12, **sizes))
    model.save_pretrained(folder)
    return model


def save_vit(folder, hidden=16):
    from transformers import ViTConfig, ViTModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, hidden_size=hidden, **sizes))
    model.save_pretrained(folder)
    return model


@vision
@pytest.mark.parametrize("shape", [(33, 40), (1, 33, 40), (3, 33, 40), (9, 33, 40)])
def test_torchvision_takes_spectrograms_pictures_and_frames(shape):
    torch.manual_seed(0)
    encoder = build_encoder(RESNET + "@random", shape, 1024).eval()
    x = torch.randn(2, *shape)
    features = encoder(x)
    assert features.shape == (2, 1024)
    if shape[0] == 9:  # the mean over the frames
        frames = [encoder.model(frame) for frame in x.split(3, dim=1)]
        torch.testing.assert_close(features, torch.stack(frames).mean(0), rtol=1e-4, atol=1e-5)
    narrow = build_encoder(RESNET + "@random", shape, 12).eval()
    assert narrow(x).shape == (2, 12) and (narrow(x) >= 0).all()


@vision
@pytest.mark.parametrize(
    ("model", "width"), [("resnet18", 512), ("resnet50", 2048), ("vit_b_16", 768), ("convnext_tiny", 768)]
)
def test_the_width_follows_the_model(model, width):
    assert library.width_of(f"torchvision:{model}") == width
    assert default_width(["small", f"torchvision:{model}"]) == width


@vision
def test_weights_of_torchvision(tmp_path, monkeypatch):
    """From a file, whatever its classifier is, or from the cache of torch.hub; what does not fit is named."""
    from torchvision import models

    torch.manual_seed(1)
    whole = models.shufflenet_v2_x0_5(num_classes=7).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    x = torch.randn(2, 3, 40, 40)
    encoder = build_encoder(f"{RESNET}@{tmp_path / 'w.pt'}", (3, 40, 40), 1024).eval()
    torch.testing.assert_close(whole.fc(encoder(x)), whole(x))

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"expected the weights of .* from https://download.pytorch.org"):
        build_encoder(RESNET, (3, 40, 40), 1024)
    (tmp_path / "checkpoints").mkdir()
    name = models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url.rpartition("/")[2]
    torch.save(models.shufflenet_v2_x0_5().state_dict(), tmp_path / "checkpoints" / name)
    assert build_encoder(RESNET, (3, 40, 40), 1024)(x).shape == (2, 1024)

    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"expected weights that fit .* lacks"):
        build_encoder(f"{RESNET}@{tmp_path / 'other.pt'}", (3, 40, 40), 1024)
    (tmp_path / "text.pt").write_text("no weights")
    for path in ("text.pt", "none.pt"):
        with pytest.raises(ValueError, match="expected weights that fit"):
            build_encoder(f"{RESNET}@{tmp_path / path}", (3, 40, 40), 1024)


@text
def test_a_text_transformer(tmp_path):
    """Its features are the output at the first token; padding changes nothing; weights come from the folder."""
    bert = save_bert(tmp_path / "bert").eval()
    encoder = build_encoder(f"transformers:{tmp_path / 'bert'}", (6,), 16).eval()
    ids = torch.tensor([[2, 5, 9, 3, 0, 0], [2, 7, 7, 8, 9, 3]])
    features = encoder(ids.float())  # as the data give them
    assert features.shape == (2, 16)
    for row, length in ((0, 4), (1, 6)):
        expected = bert(input_ids=ids[row : row + 1, :length]).last_hidden_state[0, 0]
        torch.testing.assert_close(features[row], expected, rtol=1e-4, atol=1e-5)
    assert encoder(torch.zeros(1, 6)).isfinite().all()

    torch.manual_seed(5)
    first = build_encoder(f"transformers:{tmp_path / 'bert'}@random", (6,), 16).eval()(ids)
    assert not torch.allclose(first, features)
    save_bert(tmp_path / "tuned", seed=3)
    tuned = build_encoder(f"transformers:{tmp_path / 'bert'}@{tmp_path / 'tuned'}", (6,), 16).eval()(ids)
    assert not torch.allclose(tuned, features)
    save_bert(tmp_path / "wide", hidden=32)
    with pytest.raises(ValueError, match="expected weights of width 16"):
        build_encoder(f"transformers:{tmp_path / 'bert'}@{tmp_path / 'wide'}", (6,), 16)


@text
def test_a_vision_transformer(tmp_path):
    vit = save_vit(tmp_path / "vit").eval()
    encoder = build_encoder(f"transformers:{tmp_path / 'vit'}", (6, 8, 8), 16).eval()
    x = torch.randn(2, 6, 8, 8)
    frames = [vit(pixel_values=frame).last_hidden_state[:, 0] for frame in x.split(3, dim=1)]
    torch.testing.assert_close(encoder(x), torch.stack(frames).mean(0), rtol=1e-4, atol=1e-5)


@text
def test_what_is_not_on_this_machine(tmp_path):
    for name in ("transformers:someone/no-such-model", f"transformers:{tmp_path}"):
        with pytest.raises(ValueError, match="in transformers' cache, or a folder of save_pretrained"):
            build_encoder(name, (6,), 16)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("timm:resnet18", (3, 9, 9), r"expected LIBRARY:MODEL\[@WEIGHTS\], LIBRARY one of"),
        ("torchvision:", (3, 9, 9), r"expected LIBRARY:MODEL"),
        pytest.param("torchvision:vgg", (3, 9, 9), "expected a classifier of torchvision.models", marks=vision),
        pytest.param(RESNET, (4, 9, 9), "expects pictures of 1 channel or 3 for each frame, got 4", marks=vision),
    ],
)
def test_names_and_shapes_that_are_refused(name, shape, expected):
    with pytest.raises(ValueError, match=expected):
        build_encoder(name, shape, 8)


@pytest.mark.parametrize(("name", "extra"), [("torchvision", "vision"), ("transformers", "text")])
def test_without_the_library(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'{name} is not installed: pip install "mla_ext\[{extra}\]"'):
        library.width_of(f"{name}:resnet18")


def pairs(tmp_path):
    """Token ids and pictures of 24 samples; some have no text."""
    rng = np.random.default_rng(0)
    y = np.arange(24) % 2
    ids = np.where(np.arange(6) < 4, rng.integers(5, 20, (24, 6)) + 20 * y[:, None], 0).astype(np.int32)
    pictures = (rng.integers(0, 100, (24, 3, 8, 8)) + 100 * y[:, None, None, None]).astype(np.uint8)
    np.savez(
        tmp_path / "pairs.npz",
        modalities=np.array(["text", "image"]),
        x_text=ids,
        x_image=pictures,
        row_text=np.where(np.arange(24) % 5, np.arange(24), -1),
        y=y,
        classes=np.array(["a", "b"]),
        split=np.arange(24) // 2 % 4 % 3,
    )
    return tmp_path / "pairs.npz"


@text
def test_training_from_the_command_line(tmp_path, capsys):
    """The head's width follows; token ids reach the encoder as they are; a run is evaluated without the weights."""
    save_bert(tmp_path / "bert")
    save_vit(tmp_path / "vit")
    names = {"text": f"transformers:{tmp_path / 'bert'}", "image": f"transformers:{tmp_path / 'vit'}"}
    encoders = [f"--encoder={modality}={name}" for modality, name in names.items()]
    out, data = tmp_path / "out", pairs(tmp_path)
    options = ["--epochs", "2", "--batch-size", "5", "--out", str(out), "--no-progress"]
    assert cli.main(["train", "--data", str(data), *encoders, *options]) == 0
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved["settings"]["width"] == 16 and saved["model"]["head.weight"].shape == (2, 16)
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.unlink()
    trained = capsys.readouterr().out.splitlines()
    assert cli.main(["evaluate", "--data", str(data), "--run", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == trained[1:-1]


@text
def test_token_ids_are_not_standardized(tmp_path):
    save_bert(tmp_path / "bert")
    rows = torch.arange(6)
    settings = Settings(encoders={"text": f"transformers:{tmp_path / 'bert'}"}, width=16)

    def data(ids):
        return MultimodalData(("text",), {"text": ids}, {"text": rows}, rows % 2, ("a", "b"), torch.arange(6) % 3)

    ids = torch.randint(1, 50, (6, 4))
    assert torch.equal(standardized(data(ids), settings).inputs("text", rows), ids.float())
    with pytest.raises(ValueError, match=r"expected token ids, integers, in x_text for .*, got torch\.float32"):
        standardized(data(torch.randn(6, 4)), settings)


@vision
def test_fit_moves_every_part_of_a_torchvision_encoder(tmp_path):
    rows = torch.arange(12)
    features = {"image": torch.randn(12, 3, 33, 33), "sound": torch.randn(12, 33, 33)}
    split = torch.tensor([0] * 8 + [1] * 2 + [2] * 2)
    data = MultimodalData(("image", "sound"), features, {m: rows for m in features}, rows % 2, ("a", "b"), split)
    model, optimizer = build(data, Settings(encoder=RESNET + "@random", width=1024))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, optimizer, data, epochs=1, batch_size=4, progress=False)
    fixed = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert fixed == {"fusion_index", "temperatures"}  # these are `calibrate`'s
    assert not any(isinstance(part, nn.Linear) and part.out_features == 1000 for part in model.modules())
