"""The losses of β-CLIP (paper, section 3.3).

Notation. B images have N queries (captions, sentences, phrases) in one flat list.

    text[i]             embedding of query i, of unit length
    visual[i]           what query i pooled from the patches of its image, of unit length
    image_of_query[i]   the image that query i describes: 0 … B - 1, sorted
    l[i, j] = s · visual[i] · text[j], with s = exp(logit scale): the logits

β-CAL counts the other queries of the same image, the siblings, as positives of weight β:

    w[i, j] = 1 if i = j;  β if i and j are siblings;  0 if they describe different images

    CE     cross-entropy of l with the soft targets w[i, j] / Σ_j w[i, j], the mean over all i and
           both directions (each visual over all texts, each text over all visuals)
    BCE    1 / (B · K)² times the sum of w[i, j] · softplus(-l[i, j]) over all pairs of the same
           image and of softplus(l[i, j]) over all other pairs, where K is the largest number of
           queries of an image

L_clip is CE with one query per image and β = 0. `dense_beta_cal` in tests/test_loss.py is this
definition in plain PyTorch. This code needs no [N, N] matrix, and can use several GPUs.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS_PER_TILE = 512  # rows of the logit matrix that are in memory at a time


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """L_clip, the symmetric InfoNCE of images and captions over the batches of all ranks: a scalar.
    image, text: [B, D], not normalised; scale: exp(logit scale)."""
    return beta_cal(image, text, torch.arange(len(image)), scale, beta=0, global_negatives=True)


def beta_cal(visual: Tensor, text: Tensor, image_of_query: Tensor, scale: Tensor, beta: float,
             form: str = "ce", global_negatives: bool = False) -> Tensor:
    """β-Contextualized Contrastive Alignment, as this module's docstring defines it: a scalar.

    visual, text:     [N, D], not normalised; normalised here, in float32
    image_of_query:   [N] index of each query's image, sorted, without gaps; on the CPU, where
                      reading it does not wait for the GPU
    scale:            exp(logit scale) of the pooler
    beta:             weight of siblings as positives, 0 … 1
    form:             "ce" or "bce"
    global_negatives: contrast with the queries of all ranks, so that DDP's mean over ranks is the
                      loss of the whole batch; the paper contrasts only with those of this rank
    """
    if form not in ("ce", "bce"):
        raise ValueError(f"form {form!r}: choose 'ce' or 'bce'")
    scaled = scale * normalize_fp32(visual)                                         # [N, D] s · v
    text = normalize_fp32(text)                                                     # [N, D]
    queries_per_image = image_of_query.bincount()                                   # [B]
    sizes = torch.tensor([[len(text), len(queries_per_image), queries_per_image.max()]])
    all_sizes = all_gather(sizes) if global_negatives else sizes                    # [ranks, 3]
    queries_per_rank, images_per_rank, k_per_rank = all_sizes.T.tolist()
    if form == "ce":
        losses = ce_per_query(scaled, text, image_of_query, beta, queries_per_rank)     # [N]
        denominator = 2 * sum(queries_per_rank)
    else:
        losses = bce_per_query(scaled, text, image_of_query, beta, queries_per_rank)    # [N]
        denominator = (sum(images_per_rank) * max(k_per_rank)) ** 2                     # (B · K)²
    # the definition sums over ranks, but DDP averages over them
    return len(queries_per_rank) * losses.sum() / denominator


def ce_per_query(scaled: Tensor, text: Tensor, image_of_query: Tensor, beta: float,
                 queries_per_rank: list[int]) -> Tensor:
    """CE of each query, both directions added: [N]. scaled: [N, D] s · visual

    The cross-entropy of row i is logsumexp_j l[i, j] - Σ_j w[i, j] l[i, j] / Σ_j w[i, j], where
        Σ_j w[i, j]         = 1 + β (number of siblings)
        Σ_j w[i, j] l[i, j] = (1 - β) l[i, i] + β scaled[i] · (sum of text over i and its siblings)
    """
    num_siblings = image_of_query.bincount() - 1                                    # [B]
    image_of_query = image_of_query.to(scaled.device, non_blocking=True)
    total_weight = (1 + beta * num_siblings.to(scaled, non_blocking=True))[image_of_query]  # [N]
    zeros = scaled.new_zeros(len(num_siblings), scaled.shape[1])                    # [B, D]
    scaled_sum = zeros.index_add(0, image_of_query, scaled)[image_of_query]         # [N, D]
    text_sum = zeros.index_add(0, image_of_query, text)[image_of_query]             # [N, D]
    diagonal = (scaled * text).sum(dim=1)                                           # [N] l[i, i]
    sum_over_texts = (1 - beta) * diagonal + beta * (scaled * text_sum).sum(dim=1)  # [N]
    sum_over_visuals = (1 - beta) * diagonal + beta * (scaled_sum * text).sum(dim=1)    # [N]
    over_texts, over_visuals = two_sided_logsumexp(scaled, text, queries_per_rank)  # [N], [N]
    return over_texts + over_visuals - (sum_over_texts + sum_over_visuals) / total_weight


def bce_per_query(scaled: Tensor, text: Tensor, image_of_query: Tensor, beta: float,
                  queries_per_rank: list[int]) -> Tensor:
    """BCE of each query, the sum over its row: [N]. scaled: [N, D] s · visual

    First all pairs count as negatives. Then the few pairs of the same image, in a padded [B, K, K]
    array, are corrected: plus w[i, j] · softplus(-l[i, j]), minus softplus(l[i, j]).
    """
    all_texts = all_gather_ragged(text, queries_per_rank)                           # [all N, D]

    def negatives_of_tile(tile: Tensor) -> Tensor:
        return F.softplus(tile @ all_texts.T).sum(dim=1)

    as_negatives = torch.cat(map_tiles(negatives_of_tile, scaled))                  # [N]
    index, most_queries = grid_index(image_of_query, scaled.device)
    num_images = int(image_of_query[-1]) + 1
    zeros = scaled.new_zeros(num_images, most_queries, scaled.shape[1])             # [B, K, D]
    logits = zeros.index_put(index, scaled) @ zeros.index_put(index, text).mT       # [B, K, K]
    is_query = zeros[:, :, 0].index_put(index, scaled.new_ones(()))                 # [B, K] 1 or 0
    weight = torch.full_like(logits[0], beta).fill_diagonal_(1)                     # [K, K] w
    correction = weight * F.softplus(-logits) - F.softplus(logits)
    return as_negatives + (correction * is_query[:, None]).sum(dim=2)[index]


def grid_index(image_of_query: Tensor, device: torch.device) -> tuple[tuple[Tensor, Tensor], int]:
    """The index (image [N], number within the image [N]) of N queries in a padded [B, K] grid, so
    that grid[index] has a row per query; and K, the largest number of queries of an image."""
    queries_per_image = image_of_query.bincount()                                   # [B]
    first_query = queries_per_image.cumsum(0) - queries_per_image                   # [B]
    slot = torch.arange(len(image_of_query)) - first_query[image_of_query]          # [N]
    index = (image_of_query.to(device, non_blocking=True), slot.to(device, non_blocking=True))
    return index, int(queries_per_image.max())


def normalize_fp32(x: Tensor) -> Tensor:
    """L2-normalise the last dimension, in float32 (float64 inputs, as in tests, stay float64)."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


# ---- tiles ---------------------------------------------------------------------------------------
def map_tiles(function: Callable, rows: Tensor) -> list:
    """Apply a function to ROWS_PER_TILE rows at a time, and list the results. The backward pass
    applies it again, so that at most one tile of logits is in memory."""
    return [checkpoint(function, tile, use_reentrant=False, preserve_rng_state=False)
            for tile in rows.split(ROWS_PER_TILE)]


def two_sided_logsumexp(scaled: Tensor, text: Tensor,
                        queries_per_rank: list[int]) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits: of each visual of this rank over the texts of all ranks [N], and
    of each text of this rank over the visuals of all ranks [N]. scaled: s · visual, text: [N, D]"""
    all_texts = all_gather_ragged(text, queries_per_rank)                           # [all N, D]

    def of_tile(tile: Tensor) -> tuple[Tensor, Tensor]:
        logits = tile @ all_texts.T                                                 # [tile, all N]
        return logits.logsumexp(dim=1), logits.logsumexp(dim=0)

    over_texts, per_tile = zip(*map_tiles(of_tile, scaled), strict=True)
    # the log-sum-exp over all visuals is that of the log-sum-exps over each tile of them
    over_visuals = torch.stack(per_tile).logsumexp(dim=0)                           # [all N]
    if len(queries_per_rank) > 1:
        over_visuals = all_gather(over_visuals[None]).logsumexp(dim=0)              # [all N]
        over_visuals = over_visuals.split(queries_per_rank)[rank()]                 # [N]
    return torch.cat(over_texts), over_visuals


# ---- processes -----------------------------------------------------------------------------------
def join_processes() -> torch.device:
    """Choose this process's device, and join the other processes, if torchrun started any."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # cuDNN's attention is planned anew for each shape, and ours vary from batch to batch
        torch.backends.cuda.enable_cudnn_sdp(False)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # CPU tensors travel by gloo, without waiting for a GPU; 3 hours are for rank 0's evaluation
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    return device


def rank() -> int:
    """The number of this process; 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here (with a CPU tensor, so as not to wait for the GPU)."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


class AllGather(torch.autograd.Function):
    """Concatenate the rows of all ranks. Each rank's loss reads the rows of all, so the gradient
    of a row is the sum of what all ranks send back for it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        chunks = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(chunks, x.contiguous())
        return torch.cat(chunks)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        chunks = list(grad.contiguous().chunk(world_size()))
        grad_here = torch.empty_like(chunks[0])
        dist.reduce_scatter(grad_here, chunks)
        return grad_here


def all_gather(x: Tensor) -> Tensor:
    """Concatenate x over all ranks, in their order, differentiably: [n, …] -> [ranks · n, …]."""
    return AllGather.apply(x) if dist.is_initialized() else x


def all_gather_ragged(x: Tensor, rows_per_rank: list[int]) -> Tensor:
    """Like `all_gather`, for ranks with different numbers of rows: [n, D] -> [sum of rows, D]. If
    rows_per_rank has one entry, x is returned as it is."""
    if len(rows_per_rank) == 1:
        return x
    most = max(rows_per_rank)
    chunks = all_gather(F.pad(x, (0, 0, 0, most - len(x)))).split(most)
    return torch.cat([chunk[:rows] for chunk, rows in zip(chunks, rows_per_rank, strict=True)])
