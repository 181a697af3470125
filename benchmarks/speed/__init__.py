"""The speed of the operations and of whole steps, ours against PyTorch."""
