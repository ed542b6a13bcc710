"""Causal attention over documents: softmax(q k^T / sqrt(Dh)) v, each token looking at itself and the earlier tokens of its own document.

Tokens lie in one flat run (a pack); `cu` holds the documents' boundaries. Nothing is padded in the model; only here, on the way into PyTorch's
attention, documents of similar length share a right-padded batch. A causal query never looks to its right, so padding there changes nothing
and no mask is needed: masks of N x N, and nested tensors, were slower in every case measured.
"""
import torch
import torch.nn.functional as F


def batches(cu):
    """How the documents of a pack share dense batches. Made once a forward pass, used by every layer.

    cu int32 [D+1] -> (groups, slot). groups: [(documents, padded length), ...]. slot int64 [N]: the row of each token when the groups are laid
    end to end; None when all documents have one length, so that the pack is the batch already.
    """
    lengths = cu.diff().to(torch.int64)
    lengths = lengths[lengths > 0]  # an empty document has no row
    ordered, order = lengths.sort(descending=True, stable=True)
    groups = group(ordered.tolist())
    if len(groups) == 1 and groups[0][0] * groups[0][1] == int(lengths.sum()):
        return groups, None
    starts, rows = [], 0  # the first row of each document, the longest document first
    for documents, length in groups:
        starts += range(rows, rows + documents * length, length)
        rows += documents * length
    start = torch.empty_like(lengths)
    start[order] = torch.tensor(starts, device=cu.device)
    shift = start - (lengths.cumsum(0) - lengths)  # from a token's row in the pack to its row in the groups
    return groups, torch.arange(int(lengths.sum()), device=cu.device) + shift.repeat_interleave(lengths)


def group(lengths):
    """Cut lengths, longest first, into batches of similar length: [(documents, longest length), ...].

    A shorter document joins while padding stays under an eighth of the batch, or under 64 tokens, which are cheaper than one more call. So many
    short ragged documents make a few batches, and a few long ones a batch each.
    """
    groups, documents, longest, tokens = [], 0, 0, 0
    for length in lengths:
        padded = (documents + 1) * longest
        if documents and padded - tokens - length > max(64, padded // 8):
            groups.append((documents, longest))
            documents = tokens = 0
        if not documents:
            longest = length
        documents, tokens = documents + 1, tokens + length
    return groups + [(documents, longest)] if documents else groups


class ToSlots(torch.autograd.Function):
    """x [N, ...] -> [rows, ...], token i in row slot[i], zeros elsewhere. Its gradient is a plain gather (index_select's own would be a slow scatter-add)."""

    @staticmethod
    def forward(ctx, x, slot, rows):
        ctx.save_for_backward(slot)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, slot, x)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class FromSlots(torch.autograd.Function):
    """The way back: y [rows, ...] -> [N, ...]."""

    @staticmethod
    def forward(ctx, y, slot):
        ctx.save_for_backward(slot)
        ctx.rows = len(y)
        return y.index_select(0, slot)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


def dense_attention(q, k, v, documents, length):
    """q [D*T, H, Dh], k and v [D*T, K, Dh] of D = `documents` equally long documents -> [D*T, H, Dh]."""
    q, k, v = (x.unflatten(0, (documents, length)).transpose(1, 2) for x in (q, k, v))  # [D, H or K, T, Dh]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


@torch.compiler.disable  # its shapes change with every pack; compiling them would never end
def ragged_attention(q, k, v, groups, slot):
    """As attention_reference, for documents of several lengths."""
    sizes = [documents * length for documents, length in groups]
    q, k, v = (ToSlots.apply(x, slot, sum(sizes)).split(sizes) for x in (q, k, v))
    return FromSlots.apply(torch.cat([dense_attention(*qkv, *shape) for *qkv, shape in zip(q, k, v, groups)]), slot)


def attention_reference(q, k, v, layout):
    """See attention."""
    groups, slot = layout
    return dense_attention(q, k, v, *groups[0]) if slot is None else ragged_attention(q, k, v, groups, slot)


def attention(q, k, v, layout):
    """q [N, H, Dh], k and v [N, K, Dh] with H a multiple of K -> [N, H, Dh]. `layout` is `batches(pack.cu)`. The three may be views of one tensor."""
    return attention_reference(q, k, v, layout)
