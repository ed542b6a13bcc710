"""In between: the proof moves here from _lib.py."""

from kernels._lib import PROOFS, excess, proof, prove, prove_op, with_gradients  # noqa: F401
