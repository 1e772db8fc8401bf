"""The two losses of β-CLIP, as pure functions (SPEC §3).

Embeddings come in raw and are L2-normalised here, in float32 (float64 stays). Queries are ragged: all queries
of a batch are rows of one flat list, and `owner` says whose image each row is. Nothing here knows of padding,
and no [N, N] matrix is ever kept: β-CAL goes over tiles of rows, and the backward pass computes each tile anew.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

TILE = 1024  # rows of the similarity matrix that exist at a time


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
    owner  [N]:    the image of each row, sorted, 0 … B - 1
    scale:         exp(logit scale of the pooler), scalar
    beta:          how far other queries of the same image count as positives, 0 … 1
    kind:          "ce", the soft form, or "bce", the hard form
    Returns a scalar.
    """
    v, t, owner = unit(visual), unit(text), owner.to(visual.device, non_blocking=True)
    own = (v * t).sum(1)                                                              # [N] v_i · t_i
    # images are at most N: sized so, nothing has to be read back from the device
    counts = torch.zeros_like(own).index_add(0, owner, torch.ones_like(own))          # [N] queries of image b
    if kind == "bce":
        total = (1 - beta) * F.softplus(-scale * own).sum()                           # w_ii = β + (1 - β)
        for v_tile, owner_tile in zip(v.split(TILE), owner.split(TILE)):
            total = total + checkpoint(_softplus_sum, v_tile, t, owner_tile, owner, scale, beta, use_reentrant=False)
        return total / ((owner[-1] + 1) * counts.max()) ** 2

    n = counts[owner]                                                                 # [N] queries of my image
    v_sum = torch.zeros_like(v).index_add(0, owner, v)                                # [N, D] V_b
    t_sum = torch.zeros_like(t).index_add(0, owner, t)                                # [N, D] T_b
    siblings = ((v * t_sum[owner]) + (t * v_sum[owner])).sum(1)                       # [N] v_i · T + V · t_i
    positive = scale * (2 * (1 - beta) * own + beta * siblings) / (1 + beta * (n - 1))  # [N] both sides
    over_text, over_visual = [], torch.full_like(own, -torch.inf)
    for v_tile in v.split(TILE):
        rows, columns = checkpoint(_logsumexps, v_tile, t, scale, use_reentrant=False)
        over_text.append(rows)
        over_visual = torch.logaddexp(over_visual, columns)
    return (torch.cat(over_text) + over_visual - positive).mean() / 2


def _logsumexps(v, t, scale):
    """[R, D], [N, D] -> log-sum-exps of the tile's rows [R] and, over these rows, of all columns [N]."""
    logits = scale * v @ t.T  # [R, N]
    return logits.logsumexp(1), logits.logsumexp(0)


def _softplus_sum(v, t, owner_tile, owner, scale, beta):
    """Weighted binary cross-entropies of one tile, with β on the diagonal as on all pairs of one image."""
    logits = scale * v @ t.T                           # [R, N]
    same = owner_tile[:, None] == owner                # [R, N]
    costs = F.softplus(torch.where(same, -logits, logits))
    return torch.where(same, beta * costs, costs).sum()
