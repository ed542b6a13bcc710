"""What every stage uses unchanged and no reader needs first: command line, process, run directory,
checkpoints."""
