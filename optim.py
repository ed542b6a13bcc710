"""The optimizer: Muon for the trunk's matrices, AdamW for everything else, and the learning-rate
schedule.

    Muon:   M <- mu M + (1 - mu) G, and with this new M
            W <- (1 - lr wd) W - lr sqrt(max(1, rows/cols)) polar((1 - mu) G + mu M)
    AdamW:  W <- (1 - lr wd) W - lr m / (sqrt(v) + eps)
            m, v: bias-corrected running means of G and G^2

polar(U S V^T) = U V^T, by Newton-Schulz iterations: an update that moves all directions of a matrix
equally far (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). Data parallelism lives
here too: one all-reduce of all gradients, laid flat, inside `step`. With a sharded model
(runtime/shard.py) each rank keeps the state of its own shards, and Newton-Schulz gathers one
parameter at a time."""

import torch
import torch.distributed as dist

from model import parameter_table
from runtime.errors import UserError
from runtime.shard import full_tensor, is_local_shard, local_shard

# Polar Express (Amsel et al. 2025, arXiv 2505.16932, the optimal quintics for bf16):
# x <- a x + (b A + c A^2) x with A = x x^T
POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
MUON_BATCH = 1 << 24  # elements that go through Newton-Schulz at once: enough for a GPU, 64 MB per temporary


def polar(x, dtype):
    """x [n, r, c] with r <= c -> about U V^T of each matrix, computed in `dtype`.

    Singular values end between 0.85 and 1.15, if they were not below 1/500 of the matrix's norm.
    """
    x = (x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)  # singular values below 1
    for a, b, c in POLAR:
        gram = x @ x.mT  # [n, r, r]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def choose_muon_dtype(name, device):
    """The dtype of `polar`. "auto" takes bf16 if the processor multiplies it fast (CUDA, or a CPU
    with AMX)."""
    if name == "auto":
        fast_cpu = device.type == "cpu" and torch.cpu._is_amx_tile_supported()  # PyTorch 2.10 has no public name
        name = "bf16" if device.type == "cuda" or fast_cpu else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def wsd(step, steps, warmup, decay):
    """Warm-up-stable-decay: the fraction of the peak learning rate at `step` (from 0) of `steps`.

    Linear up over `warmup` steps, linear down towards 0 over the last `decay` steps.
    """
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))


def sync_gradients(parameters):
    """Sum the gradients of all ranks in one flat all-reduce.

    A sum, not a mean: every loss is already divided by the global count.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    if is_local_shard(parameters[0]):  # the backward has summed them, and divided by the number of ranks
        torch._foreach_mul_([p.grad.to_local() for p in parameters], float(dist.get_world_size()))
        return
    for p in parameters:
        if p.grad is None:  # this rank had no document in the batch
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    parts = flat.split([p.numel() for p in parameters])
    torch._foreach_copy_([p.grad for p in parameters], [g.view_as(p) for g, p in zip(parts, parameters, strict=True)])


class Optimizer:
    """Muon for the trunk's matrices if `matrix_lr` is given, AdamW for the rest; with `matrix_lr=0`
    AdamW for all. weight_decay: of Muon's matrices, or without Muon of all matrices.

    lr: AdamW's peak rate; embed_lr and head_lr replace it for the embedding and the output matrix
    if not 0. watch: parts of parameter names, ["attn.out"] for example. After each step
    `watched_norms["grad_norm_attn.out"]` is the gradient norm, a float, of all parameters with that
    part in their names, summed over the ranks and before clipping. Raises UserError if no name has
    it."""

    def __init__(
        self,
        model,
        lr,
        *,
        matrix_lr=0.0,
        embed_lr=0.0,
        head_lr=0.0,
        betas=(0.9, 0.95),
        momentum=0.95,
        weight_decay=0.0,
        muon_dtype="auto",
        watch=(),
    ):
        table, named = parameter_table(model.config), dict(model.named_parameters())
        self.named = {name: named[name] for name in [*table, *named] if name in named}
        self.rows = {}  # {matrix that Muon updates: rows of each matrix stacked in it, q, k and v say}
        if matrix_lr:
            self.rows = {name: row.rows for name, row in table.items() if row.muon}
        self.momenta = {name: torch.zeros_like(self.named[name]) for name in self.rows}
        self.matrix_lr, self.momentum, self.weight_decay = matrix_lr, momentum, weight_decay
        self.muon_dtype = choose_muon_dtype(muon_dtype, model.embed.device)
        self.watch, self.watched_norms = watch, {}
        for watched in watch:
            if not any(watched in name for name, _ in model.named_parameters()):
                raise UserError(f"watch: no parameter of this model has {watched!r} in its name")
        self.others = {name: p for name, p in self.named.items() if name not in self.rows}
        peak_lr = {"embed": embed_lr or lr, "untied_head": head_lr or lr}
        groups = {}  # {(rate, decay): parameters}: each is one launch
        for name, p in self.others.items():
            # Decay pulls matrices towards zero; a norm's gain or a bias has no reason to be small.
            decay = weight_decay if p.dim() > 1 and not matrix_lr else 0.0
            groups.setdefault((peak_lr.get(name, lr), decay), []).append(p)
        groups = [{"params": some, "lr": rate, "weight_decay": decay} for (rate, decay), some in groups.items()]
        self.adamw = torch.optim.AdamW(groups, betas=betas, eps=1e-10, fused=True)
        for group in self.adamw.param_groups:
            group["peak_lr"] = group["lr"]

    def zero_grad(self):
        for p in self.named.values():
            p.grad = None

    @torch.no_grad()
    def step(self, lr_scale, max_grad_norm=0.0):
        """Sum the ranks' gradients, update every parameter at `lr_scale` times its peak rate, clear
        the gradients.

        max_grad_norm: gradients with a larger global norm are scaled down to it (0: never). Returns
        that norm, before clipping. If it is not finite nothing is updated: the caller must check.
        """
        sync_gradients(list(self.named.values()))
        with_grad = {name: p for name, p in self.named.items() if p.grad is not None}
        grad_norm = total_norm(with_grad.values())
        for watched in self.watch:
            norm = total_norm([p for name, p in with_grad.items() if watched in name])
            self.watched_norms[f"grad_norm_{watched}"] = norm.item()
        if grad_norm.isfinite():
            if max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(with_grad.values(), max_grad_norm, grad_norm)
            for group in self.adamw.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale
            self.adamw.step()
            self.muon_step(self.matrix_lr * lr_scale)
        self.zero_grad()
        return grad_norm

    def muon_step(self, lr):
        names = [name for name in self.rows if self.named[name].grad is not None]
        if not names:
            return
        grads, momenta = [self.named[n].grad for n in names], [self.momenta[n] for n in names]
        torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
        # Nesterov: one step ahead of the mean. From here on .grad holds the update
        torch._foreach_lerp_(grads, momenta, self.momentum)
        batches = [names]
        if is_local_shard(grads[0]):
            batches = [[name] for name in names]  # sharded: one whole parameter at a time
        for batch in batches:
            updates = [full_tensor(self.named[name].grad) for name in batch]
            matrices = [m for name, update in zip(batch, updates, strict=True) for m in update.split(self.rows[name])]
            self.orthogonalise(matrices)  # in place: they are views of the updates
            parameters = [self.named[name] for name in batch]
            if self.weight_decay:
                torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
            updates = [local_shard(update, p) for update, p in zip(updates, parameters, strict=True)]
            torch._foreach_add_(parameters, updates, alpha=-lr)

    def orthogonalise(self, updates):
        """Replace each update, a matrix, by the direction of Muon's step, in place.

        Equal shapes go through Newton-Schulz as one batch, a tall matrix as its transpose.
        """
        by_shape = {}
        for u in updates:
            by_shape.setdefault(tuple(sorted(u.shape)), []).append(u)
        for same in by_shape.values():
            n = max(1, MUON_BATCH // same[0].numel())
            for i in range(0, len(same), n):
                some = same[i : i + n]
                wide = torch.stack([u if len(u) <= u.shape[1] else u.mT for u in some])  # [n, r, c], r <= c
                for u, direction in zip(some, polar(wide, self.muon_dtype), strict=True):
                    u.copy_(direction if direction.shape == u.shape else direction.mT)
            tall = [u for u in same if u.shape[0] > u.shape[1]]
            if tall:
                torch._foreach_mul_(tall, (tall[0].shape[0] / tall[0].shape[1]) ** 0.5)

    def state(self):
        """Everything the next step depends on besides the weights: {"kind/parameter name":
        tensor}."""
        tensors = {f"momentum/{name}": m for name, m in self.momenta.items()}
        for name, p in self.others.items():
            for kind, value in self.adamw.state.get(p, {}).items():
                tensors[f"{kind}/{name}"] = value
        return tensors

    def load_state(self, tensors):
        """Take back what `state` gave; tensors may lie on any device.

        Raises KeyError, RuntimeError or ValueError if they are those of another model.
        """
        for name, m in self.momenta.items():
            m.copy_(local_shard(tensors[f"momentum/{name}"], m))
        for name, p in self.others.items():
            if f"step/{name}" not in tensors:  # no gradient has reached it yet
                continue
            state = {"step": tensors[f"step/{name}"].to(p.device, copy=True)}
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = local_shard(tensors[f"{kind}/{name}"].to(p.device, copy=True), p)
            shapes = [(t.shape, t.dtype) for t in state.values()]
            if shapes != [((), torch.float32), (p.shape, p.dtype), (p.shape, p.dtype)]:
                # fused AdamW would read and write beyond their ends
                raise ValueError(f"the moments of {name} do not have its shape or type")
            self.adamw.state[p] = state


def total_norm(parameters):
    """The norm of all their gradients together, over all shards."""
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
