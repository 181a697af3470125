"""Hugging Face Trainer: the optimizer by `optimizer_cls_and_kwargs`, its head by name, and a run that is resumed.

python examples/transformers_trainer.py        (needs `pip install transformers accelerate`)
"""

import tempfile

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import mla_ext

data = mla_ext.digits().standardized()


def split(name):
    indices = data.indices(name)
    images = data.inputs("image", indices).unsqueeze(1)
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, data.labels[indices], strict=True)]


def trainer_for(epochs, folder):
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **sizes))
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        warmup_steps=30,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    options = {"lr": 5e-3, "weight_decay": 0.01, "heads": mla_ext.find_heads(model, "classifier")}
    return Trainer(
        model,
        arguments,
        train_dataset=split("train"),
        eval_dataset=split("test"),
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(1) == result.label_ids).mean()},
        optimizer_cls_and_kwargs=(mla_ext.ProjectedAdamW, options),
    )


with tempfile.TemporaryDirectory() as folder:
    trainer_for(3, folder).train()
    trainer = trainer_for(6, folder)
    trainer.train(resume_from_checkpoint=True)  # P and the moments go on where they were
    accuracy = trainer.evaluate()["eval_accuracy"]

optimizer = trainer.optimizer.optimizer  # accelerate's wrapper holds ours
(head,) = mla_ext.find_heads(trainer.model, "classifier")
moved = (optimizer.projection(head.weight) - torch.eye(64)).norm()
print(f"accuracy {accuracy:.3f}; P is {moved:.3f} from the identity")
