"""Attention of one new token a sequence over its cached keys and values."""
import torch
import torch.nn.functional as F


def decode_attention_reference(q, k_cache, v_cache, lengths):
    """See decode_attention."""
    longest = int(lengths.max())
    k, v = k_cache[:, :longest].transpose(1, 2), v_cache[:, :longest].transpose(1, 2)  # [B, K, T, Dh]
    seen = torch.arange(longest, device=q.device) < lengths[:, None]  # [B, T]
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen[:, None, None], enable_gqa=q.shape[1] != k.shape[1])
    return out[:, :, 0]


def decode_attention(q, k_cache, v_cache, lengths):
    """q [B, H, Dh]; k_cache and v_cache [B, S, K, Dh], of which row b holds lengths[b] >= 1 tokens -> [B, H, Dh]."""
    return decode_attention_reference(q, k_cache, v_cache, lengths)
