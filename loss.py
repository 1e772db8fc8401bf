"""The two losses of β-CLIP, as pure functions (paper, section 3).

Embeddings come in raw and are L2-normalised here, in float32. Queries are the rows of one flat list, without
padding. Similarities are computed in tiles of rows, and again in the backward pass: no [N, N] matrix is kept.
With W processes (ranks), each compares its own rows with the columns of all ranks. The mean over ranks of
value and gradients, as DDP takes it, is one process's: of L_clip always, of β-CAL if `global_negatives`.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

TILE = 512  # rows of the similarity matrix that exist at a time

def clip_loss(image, text, scale):
    """Symmetric InfoNCE of image and text [B, D], times exp(logit scale), over all ranks' batch -> scalar."""
    v, t = scale * unit(image), unit(text)
    counts = gather(torch.tensor([len(t)])).tolist()                 # rows of each rank
    over_texts, over_images = log_sum_exps(v, t, counts)             # [B], [B]
    return len(counts) * (over_texts + over_images - 2 * (v * t).sum(1)).sum() / (2 * sum(counts))

def beta_cal(visual, text, owner, scale, beta, kind="ce", global_negatives=False):
    """β-contextualised contrastive alignment (β-CAL) of pooled embeddings with their queries -> scalar.

    visual, text [N, D]: the image of each query, pooled by it; the queries
    owner [N]:           the image of each query, sorted, 0 … B - 1; on the CPU, where reading costs no sync
    scale, beta:         exp(logit scale); how far other queries of an image count as positives, 0 … 1
    kind:                "ce", the soft form (cross-entropy), or "bce", the hard form (binary cross-entropy)
    global_negatives:    compare with the queries of all ranks, not (as in the recipe) of this one alone
    """
    v, t = scale * unit(visual), unit(text)
    sizes = owner.bincount()                                         # [B] queries of each image
    shape = torch.tensor([[len(v), len(sizes), sizes.max()]])
    counts, images, most = (gather(shape) if global_negatives else shape).T  # [W] each: of all ranks
    ranks, counts = len(counts), counts.tolist()
    own = (v * t).sum(1)                                             # [N] s v_i · t_i

    if kind == "bce":
        columns = gather_rows(t, counts)                             # [N, D] of all ranks
        negatives = sum(in_tiles(lambda rows: F.softplus(rows @ columns.T).sum(), v))
        positives = siblings(v, t, owner, sizes, beta) + (1 - beta) * F.softplus(-own).sum()  # w_ii = 1
        return ranks * (negatives + positives) / (images.sum() * most.max()) ** 2             # (B K)²

    owner, sizes = owner.to(v.device, non_blocking=True), sizes.to(v, non_blocking=True)
    d = (1 + beta * (sizes - 1))[owner]                              # [N]
    v_sum = torch.zeros_like(v[:len(sizes)]).index_add(0, owner, v)  # [B, D] V_b
    t_sum = torch.zeros_like(t[:len(sizes)]).index_add(0, owner, t)  # [B, D] T_b
    over_texts, over_images = log_sum_exps(v, t, counts)             # [N], [N]
    image_side = over_texts - ((1 - beta) * own + beta * (v * t_sum[owner]).sum(1)) / d
    text_side = over_images - ((1 - beta) * own + beta * (v_sum[owner] * t).sum(1)) / d
    return ranks * (image_side + text_side).sum() / (2 * sum(counts))

def unit(x):
    """L2-normalise the last dimension, in float32 (float64 stays)."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

def in_tiles(function, rows):
    """`function` of TILE rows at a time -> list; what it computes in between is not kept but recomputed."""
    return [checkpoint(function, tile, use_reentrant=False, preserve_rng_state=False)
            for tile in rows.split(TILE)]

def log_sum_exps(v, t, counts):
    """This rank's v, t [n, D], the rows of each rank -> log-sum-exps of v's logits [n] and of t's [n]."""
    columns = gather_rows(t, counts)                                 # [N, D]

    def of_a_tile(rows):
        logits = rows @ columns.T                                    # [TILE, N]
        return logits.logsumexp(1), logits.logsumexp(0)

    over_rows, over_columns = zip(*in_tiles(of_a_tile, v))
    over_columns = torch.stack(over_columns).logsumexp(0)            # [N] over this rank's rows
    if len(counts) > 1:
        over_columns = gather(over_columns[None]).logsumexp(0).split(counts)[dist.get_rank()]
    return torch.cat(over_rows), over_columns

def siblings(v, t, owner, sizes, beta):
    """What the pairs of one image cost as positives of weight β, less what they cost as negatives."""
    place = torch.arange(len(owner)) - (sizes.cumsum(0) - sizes)[owner]                # [N] 0 … K - 1
    grid = v.new_zeros(len(sizes), int(sizes.max()), v.shape[1])
    v, t = (grid.index_put((owner, place), x) for x in (v, t))       # [B, K, D]
    logits = v @ t.mT                                                # [B, K, K]
    real = (torch.arange(grid.shape[1]) < sizes[:, None]).to(logits)                   # [B, K]
    return ((beta * F.softplus(-logits) - F.softplus(logits)) * real[:, :, None] * real[:, None]).sum()

class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        # each rank has a loss of its own, which reads the rows of all ranks: a row's gradients are summed
        parts = list(grad.contiguous().chunk(dist.get_world_size()))
        dist.reduce_scatter(own := torch.empty_like(parts[0]), parts)
        return own

def gather(x):
    """The rows of all ranks in the order of the ranks, with gradient: [n, …] -> [W n, …]."""
    return Gather.apply(x) if dist.is_initialized() else x

def gather_rows(x, counts):
    """As `gather`, where each rank has another number of rows: [n, D] -> [sum(counts), D]."""
    if len(counts) == 1:
        return x
    parts = gather(F.pad(x, (0, 0, 0, max(counts) - len(x)))).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts)])
