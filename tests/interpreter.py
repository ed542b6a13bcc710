"""Mends Triton's interpreter when imported.

It lacks bf16 products (it multiplies the bit patterns) and bf16 rounding to nearest (it truncates),
and in 3.6 it makes loop bounds that numpy >= 2.4 refuses.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def bf16_to_fp32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def to_fp32(t):
    return bf16_to_fp32(t.data) if t.dtype.scalar == tl.bfloat16 else t.data.astype(np.float32)


def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
    product = np.matmul(to_fp32(a), to_fp32(b), dtype=acc.data.dtype)
    return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)


def cast_impl(self, src, dst_type):
    src_scalar, dst_scalar = src.dtype.scalar, dst_type.scalar
    if src_scalar == tl.bfloat16 and dst_scalar == tl.float32:
        return interpreter.TensorHandle(bf16_to_fp32(src.data), dst_scalar)
    if src_scalar == tl.float32 and dst_scalar == tl.bfloat16:
        return interpreter.TensorHandle(fp32_to_bf16(src.data), dst_scalar)
    return original_cast(self, src, dst_type)


def as_index(tensor):
    return int(tensor.handle.data.squeeze())


def patch_lang_tensor(tensor, scope):
    original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", as_index)


original_cast = interpreter.InterpreterBuilder.cast_impl
original_patch = interpreter._patch_lang_tensor
interpreter.InterpreterBuilder.create_dot = create_dot
interpreter.InterpreterBuilder.cast_impl = cast_impl
interpreter._patch_lang_tensor = patch_lang_tensor
