"""β-CAL and L_clip against the authors' numbers, its definition, and one process of several."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import loss
from loss import normalize_fp32


def dense_beta_cal(visual: Tensor, text: Tensor, image_of_query: Tensor, scale: Tensor,
                   beta: float, form: str = "ce") -> Tensor:
    """β-CAL as it is defined, in one process. For arguments see `beta_cal`."""
    image_of_query = image_of_query.to(visual.device)
    logits = scale * normalize_fp32(visual) @ normalize_fp32(text).T                # [N, N] l
    same_image = image_of_query[:, None] == image_of_query                          # [N, N]
    weight = (beta * same_image.to(logits)).fill_diagonal_(1)                       # [N, N] w
    if form == "ce":
        target = weight / weight.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    pair_losses = torch.where(same_image, weight * F.softplus(-logits), F.softplus(logits))
    queries_per_image = image_of_query.bincount()
    return pair_losses.sum() / (len(queries_per_image) * queries_per_image.max()) ** 2


def compute_loss(name, visual, text, image_of_query, scale, global_negatives=False):
    """β-CAL ("ce", "bce") with β = 0.4, or L_clip ("clip") of the first query of each image."""
    if name == "clip":
        first = torch.searchsorted(image_of_query, image_of_query.unique())
        return loss.clip_loss(visual[first], text[first], scale)
    return loss.beta_cal(visual, text, image_of_query, scale, 0.4, name, global_negatives)


class CountElements(TorchDispatchMode):
    """Counts the elements of the largest result, of all matrix products, and, with
    saved_tensors_hooks, of what autograd keeps for the backward pass."""
    largest = in_products = saved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
            self.in_products += result.numel() * (function == torch.ops.aten.mm.default)
        return result

    def save(self, tensor):
        self.saved += tensor.numel()
        return tensor


@pytest.fixture(params=[3, 1024], ids=["tiles of 3", "one tile"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(loss, "ROWS_PER_TILE", request.param)


def assert_golden(case, value, inputs, names=("grad_visual", "grad_text", "grad_scale")):
    ours = [value, *torch.autograd.grad(value, inputs)]
    torch.testing.assert_close(ours, [case["loss"], *map(case.get, names)], atol=2e-5, rtol=0)


def test_clip_loss_and_its_gradients_are_the_authors(golden, tiles):
    case = torch.load(golden / "clip_loss.pt", weights_only=True)
    inputs = [torch.as_tensor(case[name]).requires_grad_() for name in ("image", "text", "scale")]
    value = loss.clip_loss(*inputs)
    assert_golden(case, value, inputs, ("grad_image", "grad_text", "grad_scale"))
    bf16 = [case[name].bfloat16() for name in ("image", "text")]  # is computed in float32
    assert loss.clip_loss(*bf16, 5.0) == loss.clip_loss(*(x.float() for x in bf16), 5.0)


@pytest.mark.parametrize("function", [loss.beta_cal, dense_beta_cal])
def test_beta_cal_and_its_gradients_are_the_authors(golden, tiles, function):
    for case in torch.load(golden / "beta_cal.pt", weights_only=True):
        inputs = [torch.as_tensor(case[name]).requires_grad_()
                  for name in ("visual", "text", "scale")]
        mask = case["mask"]                                                         # [B, K]
        value = function(inputs[0][mask], inputs[1][mask], mask.nonzero()[:, 0], inputs[2],
                         case["beta"], case["kind"])
        assert_golden(case, value, inputs)


@pytest.mark.parametrize("form", ["ce", "bce"])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_beta_cal_and_its_gradients_equal_the_definition(form, beta, tiles):
    torch.manual_seed(1)
    image_of_query = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
    visual, text = torch.randn(2, 10, 4, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (loss.beta_cal, dense_beta_cal):
        value = function(visual, text, image_of_query, scale, beta, form)
        results.append([value, *torch.autograd.grad(value, [visual, text, scale])])
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="form 'soft': choose 'ce' or 'bce'"):
        loss.beta_cal(visual, text, image_of_query, scale, beta, "soft")


@pytest.mark.parametrize("name", ["clip", "ce", "bce"])
def test_no_square_matrix_is_made_and_no_tile_is_kept(monkeypatch, name):
    monkeypatch.setattr(loss, "ROWS_PER_TILE", 32)
    visual, text = torch.randn(2, 512, 8).requires_grad_()
    with CountElements() as count, saved_tensors_hooks(count.save, Tensor.detach):
        value = compute_loss(name, visual, text, torch.arange(512), torch.tensor(10.0))
        value.backward()
    assert count.largest == 32 * 512
    assert count.saved < 512 * 512 / 2


def train_on_share(rank, num_ranks, folder=None):
    """A backward pass on a rank's share of six images: {(loss, global negatives): (value and
    gradients, elements of products)}. With a folder, ranks work together, and save it there."""
    torch.manual_seed(3)
    image_of_query = torch.arange(6).repeat_interleave(torch.tensor([2, 1, 5, 1, 1, 2]))
    here = image_of_query * num_ranks // 6 == rank
    pixels = torch.randn(6, 4)[image_of_query[here]]
    queries = torch.randn(12, 4)[here]
    image_of_query = image_of_query[here] - image_of_query[here][0]
    model = nn.Linear(4, 5)
    model.scale = nn.Parameter(torch.tensor(2.0))
    encode = model
    if folder:
        dist.init_process_group("gloo", f"file://{folder}/meeting", None, num_ranks, rank)
        encode = DistributedDataParallel(model)
    results = {}
    for key in [("clip", True), ("ce", True), ("bce", True), ("ce", False), ("bce", False)]:
        model.zero_grad()
        image, text = encode(torch.cat([pixels, queries])).chunk(2)
        with CountElements() as count:
            value = compute_loss(key[0], image + text.roll(1, 1), text, image_of_query,
                                 model.scale.exp(), key[1])
        value.backward()
        gradients = [param.grad.flatten() for param in model.parameters()]
        results[key] = (torch.cat([value.detach()[None], *gradients]), count.in_products)
    if folder:
        torch.save(results, f"{folder}/{rank}.pt")
        dist.destroy_process_group()
    return results


@pytest.mark.parametrize("queries_per_rank", [[8, 4], [3, 6, 3]], ids=["2 ranks", "3 ranks"])
def test_ranks_equal_one_process_and_each_does_its_share(tmp_path, queries_per_rank):
    num_ranks = len(queries_per_rank)
    mp.start_processes(train_on_share, (num_ranks, tmp_path), num_ranks, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]
    alone = [train_on_share(rank, num_ranks) for rank in range(num_ranks)]
    for key, (whole, _) in train_on_share(0, 1).items():
        ours = torch.stack([results[key][0] for results in ranks])      # [ranks, 1 + parameters]
        expected = torch.stack([results[key][0] for results in alone])
        products = [count * count for count in queries_per_rank]
        if key[1]:  # with global negatives, the mean over ranks is the whole batch's
            ours[:, 0] = ours[:, 0].mean()
            expected = whole[None]
            products = [36 // num_ranks if key[0] == "clip" else 12 * n for n in queries_per_rank]
        expected[:, 1:] = expected[:, 1:].mean(dim=0)  # DDP's
        torch.testing.assert_close(ours, expected.expand_as(ours), atol=1e-5, rtol=0)
        assert [results[key][1] for results in ranks] == products
