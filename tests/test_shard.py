"""Sharded over two processes: each holds its half, and what they compute together is what one process computes. (Whole runs: test_pretrain, test_sft.)"""
import socket

import pytest
import torch
import torch.distributed as dist
from conftest import random_model
from test_pretrain import succeeds

from common import UserError
from data.pack import pack
from kernels.head import linear_cross_entropy
from optim import Optimizer
from shard import keep_company, shard, sharded, unsharded, whole

DOCUMENTS = [[5, 1, 2, 3, 4, 9], [7, 8], [3, 3, 3, 1], [1, 2]]
RATES = dict(matrix_lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, polar="fp32")


def nats(model, documents):
    targets = torch.tensor([t for d in documents for t in d[1:] + [0]])
    return linear_cross_entropy(model(pack(documents)), model.head, targets) / 14  # by the count of the whole batch


def ours(rank):
    """The documents of a rank: one has three, the other one."""
    return [DOCUMENTS[:1], DOCUMENTS[1:]][rank]


def steps(model, optimizer, n, rank=None):
    """n optimizer steps over DOCUMENTS, of which a rank takes its own, one document a micro-batch -> the norms."""
    norms = []
    for _ in range(n):
        for d in DOCUMENTS if rank is None else ours(rank):
            nats(model, [d]).backward()
        keep_company(model, [len(d) for d in DOCUMENTS], 1)
        norms.append(optimizer.step(1.0, clip=0.5).item())
    return norms


def in_two(rank, port, tied):
    alone = random_model(tied=tied)
    theirs = Optimizer(alone, 0.01, **RATES)
    norms = steps(alone, theirs, 3)

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = shard(random_model(tied=tied), torch.device("cpu"))
    assert sharded(model) and not sharded(alone)
    size = sum(p.to_local().numel() for p in model.parameters())
    assert abs(size / sum(p.numel() for p in alone.parameters()) - 0.5) < 0.02  # 61 rows of the embedding do not halve
    mine = Optimizer(model, 0.01, **RATES)
    assert steps(model, mine, 3, rank) == pytest.approx(norms, rel=1e-5)
    copy = unsharded(model, "cpu")
    for (name, p), q in zip(alone.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=name)
    assert (unsharded(model, "cpu", keep=rank == 0) is None) == (rank == 1)
    state = {name: whole(t) for name, t in mine.state().items()}
    for name, t in theirs.state().items():
        torch.testing.assert_close(state[name], t, rtol=1e-4, atol=1e-5, msg=name)

    # What was saved whole goes on, sharded or not
    again = shard(random_model(tied=tied), torch.device("cpu"))
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters()):
            p.copy_(q)
    loaded = Optimizer(again, 0.01, **RATES)
    loaded.load_state(state)
    assert steps(again, loaded, 2, rank) == steps(model, mine, 2, rank)

    # No gradient: whoever has less to evaluate keeps company, too
    with torch.no_grad():
        total = sum(nats(model, [d]) for d in ours(rank))
        keep_company(model, [len(d) for d in DOCUMENTS], 1)
        dist.all_reduce(total)
        torch.testing.assert_close(total, nats(unsharded(model, "cpu"), DOCUMENTS))
    print("agreed")


@pytest.mark.parametrize("tied", [False, True])
def test_two_halves_step_as_one(fork, tied):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    assert all("agreed" in succeeds(child) for child in [fork(in_two, rank, port, tied) for rank in range(2)])


def test_there_must_be_ranks_to_divide_over(make_model):
    with pytest.raises(UserError, match="--shard=fsdp.*torchrun"):
        shard(make_model(), torch.device("cpu"))
