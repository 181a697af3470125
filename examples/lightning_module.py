"""Lightning, automatic optimisation: each batch trains one modality, and the Trainer saves P and resumes with it.

python examples/lightning_module.py        (needs `pip install lightning`)
"""

import tempfile

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mla_ext

data = mla_ext.digits().standardized()


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        width = {m: data.features[m][0].numel() for m in data.modalities}
        encoders = {m: nn.Sequential(nn.Flatten(), nn.Linear(width[m], 64), nn.ReLU()) for m in data.modalities}
        self.model = mla_ext.SharedHeadModel(encoders, nn.Linear(64, 10))

    def training_step(self, batch, index):
        *inputs, labels = batch
        turn = index % len(data.modalities)  # the encoders of the others have no gradient, so they stay
        return cross_entropy(self.model(data.modalities[turn], inputs[turn]), labels)

    def configure_optimizers(self):
        optimizer = mla_ext.ProjectedSGD(self.parameters(), lr=0.05, momentum=0.9)
        optimizer.attach(self.model.head)
        return optimizer


def trainer(epochs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet)


torch.manual_seed(0)
train = data.indices("train")
loader = DataLoader(
    TensorDataset(*(data.inputs(m, train) for m in data.modalities), data.labels[train]), batch_size=32, shuffle=True
)

first = trainer(epochs=5)
first.fit(Classifier(), loader)
checkpoint = tempfile.mkdtemp() + "/last.ckpt"
first.save_checkpoint(checkpoint)

model, second = Classifier(), trainer(epochs=10)
second.fit(model, loader, ckpt_path=checkpoint)  # P and momentum go on where they were
report = mla_ext.evaluate(model.model, data, split="test")
accuracy = report.fusions["entropy"].accuracy
moved = (second.optimizers[0].projection(model.model.head.weight) - torch.eye(64)).norm()
print(f"accuracy {accuracy:.3f} after {second.current_epoch} epochs; P is {moved:.3f} from the identity")
