"""Lightning: attach the head in configure_optimizers; the rest is as with any optimizer.

python examples/lightning_module.py        (needs `pip install lightning`)
"""

import lightning
import torch
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from mla_ext import ProjectedSGD


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = Sequential(Linear(40, 64), ReLU()), Linear(64, 10)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, _):
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self):
        optimizer = ProjectedSGD(self.parameters(), lr=0.05, momentum=0.9)
        optimizer.attach(self.head)
        return optimizer


torch.manual_seed(0)
centres = torch.randn(10, 40)
labels = torch.randint(10, (2048,))
inputs = centres[labels] + torch.randn(2048, 40)
loader = DataLoader(TensorDataset(inputs, labels), batch_size=64, shuffle=True)

model = Classifier()
trainer = lightning.Trainer(
    max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(model, loader)

accuracy = (model(inputs).argmax(1) == labels).float().mean()
moved = (trainer.optimizers[0].projection(model.head.weight) - torch.eye(64)).norm()
print(f"accuracy {accuracy:.3f}; P is {moved:.3f} from the identity")
