"""The whole method on tensors of your own: encoders that share a head, training by turns, evaluation, prediction.

python examples/whole_method.py
"""

import torch
from torch import nn

import mla_ext

# 600 samples of three classes. Every sample has sound (20,); two in three also have an image (8, 8).
torch.manual_seed(0)
labels = torch.randint(3, (600,))
sound = torch.randn(3, 20)[labels] + 1.5 * torch.randn(600, 20)
image = torch.randn(3, 8, 8)[labels] + 3 * torch.randn(600, 8, 8)
has_image = torch.arange(600) % 3 > 0
data = mla_ext.MultimodalData(
    modalities=("sound", "image"),
    features={"sound": sound, "image": image[has_image]},
    rows={  # where in its features a sample is; -1: it lacks this modality
        "sound": torch.arange(600),
        "image": torch.where(has_image, has_image.cumsum(0) - 1, -1),
    },
    labels=labels,
    classes=("bird", "cat", "dog"),
    split=(torch.arange(600) % 5 - 2).clamp(min=0).to(torch.int8),  # 0 train, 1 validation, 2 test
).standardized()

# Any modules can be encoders, as long as all give the head the same number of features.
encoders = {
    "sound": nn.Sequential(nn.Linear(20, 32), nn.ReLU()),
    "image": nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()),
}
model = mla_ext.SharedHeadModel(encoders, nn.Linear(32, len(data.classes)))
optimizer = mla_ext.ProjectedSGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
optimizer.attach(model.head)

history = mla_ext.fit(model, optimizer, data, epochs=5, progress=False)  # keeps the best epoch on validation
report = mla_ext.evaluate(model, data, split="test")
for name, score in (report.modalities | report.fusions).items():
    print(f"{name}: accuracy {score.accuracy:.3f} on {score.samples} samples")

prediction = mla_ext.predict(model, data, data.indices("test")[:1])
print("first test sample, weight of each modality:", prediction.weights[:, 0].tolist())
