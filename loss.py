"""The two losses of β-CLIP, as pure functions (SPEC §3).

Embeddings come in raw and are L2-normalised here, in float32 (float64 stays). Queries are ragged: all queries
of a batch are rows of one flat list, and `owner` says whose image each row is. Nothing here knows of padding,
and no [N, N] matrix is ever kept: β-CAL goes over tiles of rows, which the backward pass computes anew where it needs them.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

TILE = 512  # rows of the similarity matrix that exist at a time


def unit(x):
    """L2-normalise the last dimension, in float32 at least."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)  # every rank's loss speaks of every rank's rows
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """The rows of all ranks, in the order of the ranks, with their gradient: [B, D] -> [W * B, D].

    Every rank then computes the whole loss, and the mean of the ranks' gradients, which DDP takes, is the
    gradient of one process with the whole batch (SPEC §10.2).
    """
    return Gather.apply(x) if dist.is_initialized() else x


def gather_queries(visual, text, owner):
    """All ranks' queries for β-CAL, however many each has: [n, D], [n, D], owner [n], on the CPU -> [N, D], [N, D], [N].

    Every rank has as many images as every other.
    """
    counts = gather(owner.bincount())                                                 # [W * B] queries of each image
    rows = counts.view(-1, owner[-1] + 1).sum(1).tolist()                             # [W] queries of each rank

    def ragged(x):
        padded = gather(F.pad(x, (0, 0, 0, max(rows) - len(x))))                      # [W * max, D]
        return torch.cat([part[:count] for part, count in zip(padded.split(max(rows)), rows)])

    return ragged(visual), ragged(text), torch.arange(len(counts)).repeat_interleave(counts)


def clip_loss(image, text, scale):
    """Symmetric InfoNCE between matched rows: [B, D], [B, D], scalar exp(logit scale) -> scalar."""
    logits = scale * unit(image) @ unit(text).T  # [B, B]
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def beta_cal(visual, text, owner, scale, beta, kind="ce"):
    """β-contextualised contrastive alignment of pooled embeddings with their queries (SPEC §3).

    visual [N, D]: the image of each query, pooled by that query
    text   [N, D]: the queries
    owner  [N]:    the image of each row, sorted, 0 … B - 1; best on the CPU, then nothing waits for the device
    scale:         exp(logit scale of the pooler), scalar
    beta:          how far other queries of the same image count as positives, 0 … 1
    kind:          "ce", the soft form, or "bce", the hard form
    Returns a scalar.
    """
    v, t, owner = unit(visual), unit(text), owner.cpu()
    images, there = int(owner[-1]) + 1, owner.to(v.device, non_blocking=True)
    own = (v * t).sum(1)                                                    # [N] v_i · t_i
    counts = own.new_zeros(images).index_add(0, there, torch.ones_like(own))  # [B] queries of each image
    if kind == "bce":
        total = SoftplusSum.apply(scale * v, t, owner, beta) + (1 - beta) * F.softplus(-scale * own).sum()  # w_ii = β + (1 - β)
        return total / (images * counts.max()) ** 2

    d = 1 + beta * (counts - 1)                                             # [B] d_i of each image's queries
    v_sum = v.new_zeros(images, v.shape[1]).index_add(0, there, v)          # [B, D] V_b
    t_sum = t.new_zeros(images, t.shape[1]).index_add(0, there, t)          # [B, D] T_b
    # over the rows of an image, both v_i · T_b and V_b · t_i sum to V_b · T_b
    positive = 2 * scale * ((1 - beta) * (own / d[there]).sum() + beta * ((v_sum * t_sum).sum(1) / d).sum())
    over_text, over_visual = LogSumExps.apply(scale * v, t)                 # [N], [N]
    return (over_text.sum() + over_visual.sum() - positive) / (2 * len(v))


class LogSumExps(torch.autograd.Function):
    """v [N, D], t [N, D] -> log-sum-exps of the rows [N] and of the columns [N] of v @ t.T, tile by tile."""

    @staticmethod
    def forward(ctx, v, t):
        rows, columns = torch.empty_like(v[:, 0]), torch.full_like(v[:, 0], -torch.inf)
        for at in range(0, len(v), TILE):
            logits = v[at:at + TILE] @ t.T                                  # [R, N]
            rows[at:at + TILE] = logits.logsumexp(1)
            columns = torch.logaddexp(columns, logits.logsumexp(0))
        ctx.save_for_backward(v, t, rows, columns)
        return rows, columns

    @staticmethod
    def backward(ctx, grad_rows, grad_columns):
        v, t, rows, columns = ctx.saved_tensors
        grad_v, grad_t = torch.empty_like(v), torch.zeros_like(t)
        for at in range(0, len(v), TILE):
            mine = slice(at, at + TILE)
            logits = v[mine] @ t.T                                          # [R, N]
            grad = (logits - rows[mine, None]).exp_().mul_(grad_rows[mine, None])
            grad += logits.sub_(columns).exp_().mul_(grad_columns)
            grad_v[mine] = grad @ t
            grad_t.addmm_(grad.T, v[mine])
        return grad_v, grad_t


class SoftplusSum(torch.autograd.Function):
    """v [N, D], t [N, D], owner [N], on the CPU -> the weighted binary cross-entropies of v @ t.T, summed, tile by tile.

    β weighs all pairs of one image, the pair of a query with itself too.
    """

    @staticmethod
    def forward(ctx, v, t, owner, beta):
        ctx.save_for_backward(v, t)
        ctx.owner, ctx.beta, total = owner, beta, v.new_zeros(())
        for mine, near, same in SoftplusSum.tiles(owner, v.device):
            logits = v[mine] @ t.T                                          # [R, N]
            costs = F.softplus(logits)
            costs[:, near] = torch.where(same, beta * (costs[:, near] - logits[:, near]), costs[:, near])
            total += costs.sum()
        return total

    @staticmethod
    def backward(ctx, grad_total):
        v, t = ctx.saved_tensors
        grad_v, grad_t = torch.empty_like(v), torch.zeros_like(t)
        for mine, near, same in SoftplusSum.tiles(ctx.owner, v.device):
            grad = (v[mine] @ t.T).sigmoid_()                               # [R, N]
            grad[:, near] = torch.where(same, ctx.beta * (grad[:, near] - 1), grad[:, near])
            grad_v[mine] = grad @ t
            grad_t.addmm_(grad.T, v[mine])
        return grad_v.mul_(grad_total), grad_t.mul_(grad_total), None, None

    @staticmethod
    def tiles(owner, device):
        """Rows of each tile, the columns of the images that they belong to, and which of these pairs are of one image."""
        there = owner.to(device, non_blocking=True)
        for at in range(0, len(owner), TILE):
            mine = slice(at, at + TILE)
            near = slice(*torch.searchsorted(owner, owner[mine][[0, -1]] + torch.tensor([0, 1])).tolist())
            yield mine, near, there[mine, None] == there[near]
