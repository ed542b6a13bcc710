"""Hand-written ops: one file an op, each with its plain PyTorch reference."""
