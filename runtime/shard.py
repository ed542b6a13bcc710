"""Sharding: parameters, gradients and optimizer state divided over torchrun's ranks (FSDP2; Zhao et
al. 2023, arXiv 2304.11277), for models too large for one GPU.

A block's weights are gathered when it runs and dropped afterwards; its gradients are summed and
divided again in the backward. Losses are those of an unsharded run, and checkpoints do not depend
on the number of ranks. Left out: mixed precision of what is sent, tensor parallelism, and sharding
in reinforcement learning, which samples all the time and needs the weights whole.

torch.distributed.tensor and .fsdp are imported where they are used: they take a second, which a
script of one process need not wait for."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from model import GPT
from runtime.errors import UserError
from runtime.process import world_size


def is_sharded(model):
    if not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_local_shard(tensor):
    """Whether this rank holds only a shard of the tensor."""
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def shard(model, device):
    """Divide the model's parameters over the ranks, block by block, onto `device`, and return it.

    Raises UserError if this process is not one of torchrun's.
    """
    if not dist.is_initialized():
        raise UserError(
            "--shard=fsdp: there are no ranks to divide over; start with torchrun --nproc_per_node=N, or leave it out"
        )
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh)
    return model


def full_tensor(tensor):
    """The tensor with all its shards, the same on all ranks; all of them must call it."""
    return tensor.full_tensor() if is_local_shard(tensor) else tensor


def local_shard(tensor, like):
    """This rank's shard of `tensor`, which every rank has in full, if `like` is sharded; else
    `tensor`."""
    if not is_local_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: nothing is sent
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def unsharded(model, device, keep=True):
    """An unsharded copy of a sharded model on `device`, to sample from or to save; an unsharded
    model as it is.

    All ranks must call it; without `keep` a rank gets None.
    """
    if not is_sharded(model):
        return model
    copy = None
    if keep:
        with torch.device(device):
            copy = GPT(model.config)
    for name, p in model.named_parameters():
        p = full_tensor(p)
        if keep:
            copy.get_parameter(name).copy_(p)
    return copy
