"""Sharded over two processes: each holds its half, and what they compute together is what one
process computes. (Whole runs: test_pretrain, test_sft.)"""

import pytest
import torch
import torch.distributed as dist
from conftest import random_model
from runs import free_port, succeeds

from data.pack import pack
from kernels.head import linear_cross_entropy
from optim import Optimizer
from runtime.batches import micro_batches
from runtime.errors import UserError
from runtime.shard import full_tensor, is_sharded, shard, unsharded

CPU = torch.device("cpu")
DOCUMENTS = [[5, 1, 2, 3, 4, 9], [7, 8], [3, 3, 3, 1], [1, 2]]  # one rank has one of them, the other three
OPTIONS = {"matrix_lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1, "muon_dtype": "fp32"}
WATCHED = ("attn.out",)


def loss(model, documents):
    targets = torch.tensor([t for d in documents for t in d[1:] + [0]])
    return linear_cross_entropy(model(pack(documents)), model.head, targets) / 14  # tokens of the whole batch


def train(model, optimizer, steps):
    """Steps over DOCUMENTS, one document per micro-batch; returns the gradient norms, all and
    watched."""
    norms = []
    for _ in range(steps):
        for part in micro_batches(model, [len(d) for d in DOCUMENTS], 1):
            loss(model, DOCUMENTS[part]).backward()
        norms += [optimizer.step(1.0, max_grad_norm=0.5).item(), optimizer.watched_norms["grad_norm_attn.out"]]
    return norms


def in_two(rank, port, shape):
    alone = random_model(**shape)
    optimizer_alone = Optimizer(alone, 0.01, watch=WATCHED, **OPTIONS)
    norms = train(alone, optimizer_alone, 3)

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = shard(random_model(**shape), CPU)
    assert is_sharded(model) and not is_sharded(alone)
    size = sum(p.to_local().numel() for p in model.parameters())
    total = sum(p.numel() for p in alone.parameters())
    assert abs(size / total - 0.5) < 0.02  # 61 rows of the embedding do not halve
    optimizer = Optimizer(model, 0.01, watch=WATCHED, **OPTIONS)
    assert train(model, optimizer, 3) == pytest.approx(norms, rel=1e-5)
    copy = unsharded(model, "cpu")
    for (name, p), q in zip(alone.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=name)
    assert (unsharded(model, "cpu", keep=rank == 0) is None) == (rank == 1)
    state = {name: full_tensor(t) for name, t in optimizer.state().items()}
    for name, t in optimizer_alone.state().items():
        torch.testing.assert_close(state[name], t, rtol=1e-4, atol=1e-5, msg=name)

    # What was saved in full continues, sharded or not
    again = shard(random_model(**shape), CPU)
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    loaded = Optimizer(again, 0.01, watch=WATCHED, **OPTIONS)
    loaded.load_state(state)
    assert train(again, loaded, 2) == train(model, optimizer, 2)

    # Without gradients, too, the rank with fewer documents runs as often as the other
    with torch.no_grad():
        parts = micro_batches(model, [len(d) for d in DOCUMENTS], 1)
        value = torch.stack([loss(model, DOCUMENTS[part]) for part in parts]).sum()
        dist.all_reduce(value)
        torch.testing.assert_close(value, loss(unsharded(model, "cpu"), DOCUMENTS))
    print("agreed")


@pytest.mark.parametrize("shape", [{"window": 3, "window_every": 2}, {"tied": True}], ids=["windows", "tied"])
def test_two_halves_step_as_one(fork, shape):
    port = free_port()
    assert all("agreed" in succeeds(child) for child in [fork(in_two, rank, port, shape) for rank in range(2)])


def test_there_must_be_ranks_to_divide_over(make_model):
    with pytest.raises(UserError, match="--shard=fsdp.*torchrun"):
        shard(make_model(), CPU)
