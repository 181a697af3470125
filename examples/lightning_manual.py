"""Lightning, manual optimisation: a batch makes one step of each modality, all through one head, as in the paper.

python examples/lightning_manual.py        (needs `pip install lightning`)
"""

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mla_ext

data = mla_ext.digits().standardized()


class Alternating(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        width = {m: data.features[m][0].numel() for m in data.modalities}
        encoders = {m: nn.Sequential(nn.Flatten(), nn.Linear(width[m], 64), nn.ReLU()) for m in data.modalities}
        self.model = mla_ext.SharedHeadModel(encoders, nn.Linear(64, 10))

    def training_step(self, batch, _):
        *inputs, labels = batch
        optimizer = self.optimizers()
        for modality, x in zip(data.modalities, inputs, strict=True):
            optimizer.zero_grad()  # no gradient is left: the encoders of the others stay
            self.manual_backward(cross_entropy(self.model(modality, x), labels))
            self.clip_gradients(optimizer, gradient_clip_val=5.0)
            optimizer.step()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = mla_ext.ProjectedSGD(self.parameters(), lr=0.05, momentum=0.9)
        optimizer.attach(self.model.head)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)]


torch.manual_seed(0)
train = data.indices("train")
loader = DataLoader(
    TensorDataset(*(data.inputs(m, train) for m in data.modalities), data.labels[train]), batch_size=32, shuffle=True
)

model = Alternating()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", **quiet)
trainer.fit(model, loader)

accuracy = mla_ext.evaluate(model.model, data, split="test").fusions["entropy"].accuracy
moved = (trainer.optimizers[0].projection(model.model.head.weight) - torch.eye(64)).norm()
print(f"accuracy {accuracy:.3f} of the fused modalities; P is {moved:.3f} from the identity")
