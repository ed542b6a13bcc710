"""Hand-written ops, one file per op, each with its plain PyTorch reference."""
