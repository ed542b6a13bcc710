"""Sharding: parameters, gradients and optimizer state divided over torchrun's ranks, for models too large to lie whole on each (FSDP2; Zhao et al. 2023,
arXiv 2304.11277). A block's weights are gathered when it runs and let go after it; its gradients are added up and divided again in the backward.

Losses are those of an unsharded run, and checkpoints do not tell how many ranks wrote them. Left out: lower precision on the way, sharding of one matrix
product (tensor parallelism), sharding in reinforcement learning, which samples all the time and needs the weights whole.
"""
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common import UserError, rank, world_size
from data.pack import pack, share, split
from model import GPT


def sharded(model):
    return isinstance(model, FSDPModule)


def shard(model, device):
    """Divide the model's parameters over the ranks, each block's on their own, onto `device`: the whole model never has to fit there. Returns it.

    UserError where this process is none of torchrun's.
    """
    if not dist.is_initialized():
        raise UserError("--shard=fsdp: there are no ranks to divide over; start it with torchrun --nproc_per_node=N, or leave it out")
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh)
    return model


def whole(tensor):
    """A tensor with all its shards, the same on all ranks; all of them must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor, like):
    """Of a tensor that every rank has whole, what is this rank's where `like` is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # None: nothing is sent


@torch.no_grad()
def unsharded(model, device, keep=True):
    """The model as it is, or where it is sharded a whole copy on `device`, to sample from or to save. All ranks must call it; without `keep` a rank gets None."""
    if not sharded(model):
        return model
    with torch.device(device):
        copy = GPT(model.config) if keep else None
    for name, p in model.named_parameters():
        p = whole(p)
        if keep:
            copy.get_parameter(name).copy_(p)
    return copy


def keep_company(model, lengths, micro_tokens):
    """Run a sharded model on nothing until this rank has run it as often as the rank with most micro-batches: what it gathers, it gathers from all.

    lengths: of all documents of the batch, of which each rank takes its `share`. With gradients enabled the backward is run as well; it adds 0.
    """
    if not sharded(model):
        return
    runs = [len(split(lengths[slice(*share(lengths, r, world_size()))], micro_tokens)) for r in range(world_size())]
    for _ in range(max(runs) - runs[rank()]):
        hidden = model(pack([[0]]).to(model.embed.device))
        if torch.is_grad_enabled():
            ((hidden.sum() + model.head.sum()) * 0).backward()
