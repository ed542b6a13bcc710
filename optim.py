"""The optimizer: Muon for the trunk's matrices, AdamW for everything else, and the warm-up-stable-decay schedule.

    Muon:   M <- mu M + (1 - mu) G;   W <- (1 - lr wd) W - lr sqrt(max(1, rows/cols)) polar((1 - mu) G + mu M)
    AdamW:  W <- (1 - lr wd) W - lr m / (sqrt(v) + eps)          (m, v: bias-corrected running means of G and G^2)

polar(U S V^T) = U V^T, by Newton-Schulz iterations: an update that moves all directions of a matrix equally far (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon). Data parallelism lives here too: one all-reduce of all gradients, laid flat, inside `step`; of a sharded
model (shard.py) each rank keeps the state of its own shards, and Newton-Schulz, which needs a matrix whole, gathers one parameter at a time.
"""
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from shard import own, whole

# Polar Express (Amsel et al. 2025, arXiv 2505.16932, the optimal quintics for bf16): x <- a x + (b A + c A^2) x with A = x x^T
POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
MUON_BATCH = 1 << 24  # elements that go through Newton-Schulz at once: enough to fill a GPU, and 64 MB a temporary


def polar(x, dtype):
    """x [n, r, c] with r <= c -> about U V^T of each matrix [n, r, c]: singular values from 0.85 to 1.15, where they were not below 1/500 of its norm. Computed in `dtype`."""
    x = (x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)  # all singular values below 1, with room for rounding
    for a, b, c in POLAR:
        gram = x @ x.mT  # [n, r, r]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def polar_dtype(name, device):
    """The dtype of `polar`: "bf16" or "fp32"; "auto" takes bf16 where the processor multiplies it fast (CUDA; a CPU with AMX tiles, 2x there)."""
    fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False))
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": torch.bfloat16 if fast else torch.float32}[name]


def wsd(step, steps, warmup, decay):
    """Warm-up-stable-decay: the multiple of the peak learning rate at `step` of `steps`. Linear up over `warmup` steps, linear down towards 0 over the last `decay` steps."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))


def sync_gradients(parameters):
    """Add up the gradients of all ranks in one flat all-reduce. A sum, not a mean: every loss is already divided by the global count."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    if isinstance(parameters[0], DTensor):  # the backward has added them up already, and divided by the number of ranks
        torch._foreach_mul_([p.grad.to_local() for p in parameters], float(dist.get_world_size()))
        return
    for p in parameters:
        if p.grad is None:  # this rank had no document in the batch
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    torch._foreach_copy_([p.grad for p in parameters], [g.view_as(p) for g, p in zip(flat.split([p.numel() for p in parameters]), parameters)])


class Optimizer:
    """Muon for `model.matrices()` where `matrix_lr` is given, AdamW for the rest; with `matrix_lr=0` AdamW for everything.

    lr: AdamW's; embed_lr and head_lr replace it for the embedding and the output matrix where not 0. `step(multiple)` scales them all.
    """

    def __init__(self, model, lr, *, matrix_lr=0.0, embed_lr=0.0, head_lr=0.0, betas=(0.9, 0.95), momentum=0.95, weight_decay=0.0, polar="auto"):
        named = dict(model.named_parameters())
        self.parameters = list(named.values())
        self.rows = model.matrices() if matrix_lr else {}
        self.matrices = {name: named[name] for name in self.rows}
        self.momenta = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        self.matrix_lr, self.momentum, self.weight_decay = matrix_lr, momentum, weight_decay
        self.dtype = polar_dtype(polar, self.parameters[0].device)
        self.others = {name: p for name, p in named.items() if name not in self.matrices}
        rate = {"embed": embed_lr or lr, "untied_head": head_lr or lr}
        # Decay pulls matrices towards zero; a norm's gain or a bias has no reason to be small.
        groups = [{"params": [p], "lr": rate.get(n, lr), "weight_decay": weight_decay if p.dim() > 1 and not matrix_lr else 0.0} for n, p in self.others.items()]
        self.adamw = torch.optim.AdamW(groups, betas=betas, eps=1e-10, fused=True)
        for g in self.adamw.param_groups:
            g["peak"] = g["lr"]

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self, multiple, clip=0.0):
        """Add the ranks' gradients, update every parameter at `multiple` of the peak rates, clear the gradients. Returns their global norm.

        clip: largest norm let through (0: any). A norm that is not finite changes nothing: the caller must look at what is returned.
        """
        sync_gradients(self.parameters)
        with_grad = [p for p in self.parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in with_grad]))
        if norm.isfinite():
            if clip:
                torch.nn.utils.clip_grads_with_norm_(with_grad, clip, norm)
            for g in self.adamw.param_groups:
                g["lr"] = g["peak"] * multiple
            self.adamw.step()
            self.muon_step(self.matrix_lr * multiple)
        self.zero_grad()
        return norm

    def muon_step(self, lr):
        names = [n for n, p in self.matrices.items() if p.grad is not None]
        if not names:
            return
        grads, momenta = [self.matrices[n].grad for n in names], [self.momenta[n] for n in names]
        torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
        torch._foreach_lerp_(grads, momenta, self.momentum)  # Nesterov: one step ahead of the mean. No one needs the gradients any more
        together = [[i] for i in range(len(names))] if isinstance(grads[0], DTensor) else [range(len(names))]  # sharded: one whole at a time
        for some in together:
            directions = [whole(grads[i]) for i in some]
            self.orthogonalise([part for i, u in zip(some, directions) for part in u.split(self.rows[names[i]])])
            for i, u in zip(some, directions):
                p = self.matrices[names[i]]
                if self.weight_decay:
                    p.mul_(1 - lr * self.weight_decay)
                p.add_(own(u, p), alpha=-lr)

    def orthogonalise(self, updates):
        """Replace each update, a matrix, by the direction of Muon's step, in place. Equal shapes go through Newton-Schulz as one batch, a tall matrix as its transpose."""
        by_shape = {}
        for u in updates:
            by_shape.setdefault(tuple(sorted(u.shape)), []).append(u)
        for same in by_shape.values():
            n = max(1, MUON_BATCH // same[0].numel())
            for some in (same[i : i + n] for i in range(0, len(same), n)):
                directions = polar(torch.stack([u if len(u) <= u.shape[1] else u.mT for u in some]), self.dtype)
                for u, d in zip(some, directions):
                    u.copy_(d if d.shape == u.shape else d.mT).mul_(max(1.0, u.shape[0] / u.shape[1]) ** 0.5)

    def state(self):
        """Everything the next step depends on besides the weights: {"kind/parameter name": tensor}."""
        tensors = {f"momentum/{name}": m for name, m in self.momenta.items()}
        for name, p in self.others.items():
            tensors.update({f"{kind}/{name}": value for kind, value in self.adamw.state.get(p, {}).items()})
        return tensors

    def load_state(self, tensors):
        """Take back what `state` gave; tensors may lie on any device. KeyError, RuntimeError or ValueError where they are those of another model."""
        for name, m in self.momenta.items():
            m.copy_(own(tensors[f"momentum/{name}"], m))
        for name, p in self.others.items():
            if f"step/{name}" in tensors:
                keep = lambda kind: own(tensors[f"{kind}/{name}"].to(p.device, copy=True), p)  # noqa: E731
                state = self.adamw.state[p] = {"step": tensors[f"step/{name}"].to(p.device, copy=True), "exp_avg": keep("exp_avg"), "exp_avg_sq": keep("exp_avg_sq")}
                if [(t.shape, t.dtype) for t in state.values()] != [((), torch.float32), *2 * [(p.shape, p.dtype)]]:
                    raise ValueError(f"the moments of {name} have not its shape or type")  # fused AdamW would read and write beyond their ends
