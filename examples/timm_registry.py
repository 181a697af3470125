"""timm: "projectedsgd" in its registry of optimizers, with its parameter groups and schedules.

python examples/timm_registry.py        (needs `pip install timm`)
"""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mla_ext
from mla_ext.integrations.timm import register

register()  # "projectedsgd" and "projectedadamw"

torch.manual_seed(0)
data = mla_ext.digits().standardized()
train, test = data.indices("train"), data.indices("test")
images = data.inputs("image", torch.arange(len(data))).unsqueeze(1)
loader = DataLoader(TensorDataset(images[train], data.labels[train]), batch_size=32, shuffle=True)

model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
head = model.get_classifier()
optimizer = create_optimizer_v2(model, "projectedsgd", lr=0.05, weight_decay=1e-4, heads=[head])
scheduler = CosineLRScheduler(optimizer, t_initial=8, warmup_t=1, warmup_lr_init=1e-4)

for epoch in range(8):
    scheduler.step(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    accuracy = (model(images[test]).argmax(1) == data.labels[test]).float().mean()
moved = (optimizer.projection(head.weight) - torch.eye(head.in_features)).norm()
print(f"accuracy {accuracy:.3f}; {len(optimizer.param_groups)} groups; P is {moved:.3f} from the identity")
