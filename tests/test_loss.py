"""β-CAL and L_clip against the authors' numbers, a naive definition, and one process against several."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import loss

def naive_beta_cal(visual, text, owner, scale, beta, kind):
    """The definition, pair by pair."""
    v, t = ([x / x.norm() for x in rows] for rows in (visual, text))
    n, owner, total = len(v), owner.tolist(), 0
    logit = [[scale * v[i].dot(t[j]) for j in range(n)] for i in range(n)]
    over_texts, over_images = ([torch.stack(x).exp().sum().log() for x in y] for y in (logit, zip(*logit)))
    for i, j in itertools.product(range(n), repeat=2):
        same, weight = owner[i] == owner[j], 1 if i == j else beta
        if kind == "ce" and same:
            target = weight / (1 + beta * (owner.count(owner[i]) - 1))
            total = total - target * (2 * logit[i][j] - over_texts[i] - over_images[j]) / (2 * n)
        if kind == "bce":
            total = total + (weight if same else 1) * (1 + ((-1) ** same * logit[i][j]).exp()).log()
    return total if kind == "ce" else total / (len(set(owner)) * max(map(owner.count, owner))) ** 2

def value_of(kind, image, text, visual, owner, scale, global_negatives=False):
    if kind == "clip":
        return loss.clip_loss(image, text[torch.searchsorted(owner, torch.arange(len(image)))], scale)
    return loss.beta_cal(visual, text, owner, scale, 0.4, kind, global_negatives)

@pytest.fixture(params=[3, 1024], ids=["tiles of 3", "one tile"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(loss, "TILE", request.param)

def test_golden_values_and_gradients(golden, tiles):
    clip = torch.load(golden / "clip_loss.pt", weights_only=True)
    for case in [clip, *torch.load(golden / "beta_cal.pt", weights_only=True)]:
        image = "image" if case is clip else "visual"
        inputs = [torch.as_tensor(case[name]).clone().requires_grad_() for name in (image, "text", "scale")]
        if case is clip:
            value = loss.clip_loss(*inputs)
        else:
            mask, scale = case["mask"], inputs[2]
            rows = inputs[0][mask], inputs[1][mask], mask.nonzero()[:, 0]
            value = loss.beta_cal(*rows, scale, case["beta"], case["kind"])
        ours = [value, *torch.autograd.grad(value, inputs)]
        theirs = [case[name] for name in ("loss", f"grad_{image}", "grad_text", "grad_scale")]
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)

@pytest.mark.parametrize("kind", ["ce", "bce"])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_beta_cal_equals_the_naive_definition_in_any_order_of_images(kind, beta, tiles):
    torch.manual_seed(1)
    owner, scale = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3]), torch.tensor(4.0).double().requires_grad_()
    visual, text = torch.randn(2, 10, 4, dtype=torch.float64).requires_grad_()
    inputs = (visual, text, scale)
    values = [f(visual, text, owner, scale, beta, kind) for f in (loss.beta_cal, naive_beta_cal)]
    results = [[value, *torch.autograd.grad(value, inputs)] for value in values]
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda v, t, s: loss.beta_cal(v, t, owner, s, beta, kind), inputs)
    rows, moved = [4, 5, 6, 7, 0, 1, 2, 8, 9, 3], torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    torch.testing.assert_close(loss.beta_cal(visual[rows], text[rows], moved, scale, beta, kind), values[0])

def test_values_by_hand():
    scale, ones, eye, softplus = torch.tensor(5.0), torch.ones(2, 3), torch.eye(2), math.log1p(math.exp(-5))
    # two queries of one image: all alike, so each softmax is uniform over 2 and each softplus is of -5; or
    # orthogonal, each its own pooled image, where β = 0 wants the diagonal alone and β = 1 wants all alike
    for x, kind, beta, value in [(ones, "ce", 0, math.log(2)), (ones, "ce", 1, math.log(2)),
                                 (ones, "bce", 0, softplus / 2), (ones, "bce", 1, softplus),
                                 (eye, "ce", 0, softplus), (eye, "ce", 1, softplus + 5 / 2)]:
        ours = loss.beta_cal(x, x, torch.tensor([0, 0]), scale, beta, kind)
        assert ours.item() == pytest.approx(value, abs=1e-6)
    assert loss.clip_loss(eye.bfloat16(), eye.bfloat16(), scale).item() == pytest.approx(softplus, abs=1e-6)

class Made(TorchDispatchMode):
    """Counts operations but for views, the elements of their largest result, and those of all products."""
    operations = largest = products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += not function.is_view
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
            self.products += out.numel() * (function == torch.ops.aten.mm.default)
        return out

@pytest.mark.parametrize("kind", ["clip", "ce", "bce"])
def test_no_square_matrix_is_made_and_no_tile_is_kept(monkeypatch, kind):
    monkeypatch.setattr(loss, "TILE", 32)
    (visual, text), n, kept = torch.randn(2, 512, 8).requires_grad_(), 512, []
    with Made() as made, saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        value_of(kind, visual, text, visual, torch.arange(n), torch.tensor(10.0)).backward()
    assert made.largest == 32 * n and sum(kept) < n * n / 2

def run(rank=0, world=1, wrap=lambda net: net):
    """{(loss, global negatives): value, gradients, elements of products} of a rank's share of images."""
    torch.manual_seed(3)
    net, images, queries, results = torch.nn.Linear(4, 5), torch.randn(6, 4), torch.randn(12, 4), {}
    net.scale = torch.nn.Parameter(torch.tensor(2.0))
    owner = torch.arange(6).repeat_interleave(torch.tensor([2, 1, 5, 1, 1, 2]))  # ragged, between ranks too
    own = owner * world // 6 == rank
    owner, images, queries = owner[own] - owner[own][0], images.chunk(world)[rank], queries[own]
    wrapped = wrap(net)
    for key in [("clip", True), ("ce", True), ("bce", True), ("ce", False), ("bce", False)]:
        net.zero_grad()
        image, text = wrapped(torch.cat([images, queries])).split([len(images), len(queries)])
        visual = image[owner] + text.roll(1, 1)
        with Made() as made:
            value = value_of(key[0], image, text, visual, owner, net.scale.exp(), key[1])
        value.backward()
        results[key] = value.item(), [p.grad.clone() for p in net.parameters()], made.products
    return results

def one_rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(run(rank, world, DistributedDataParallel), f"{folder}/{rank}.pt")
    dist.destroy_process_group()

@pytest.mark.parametrize("world, queries", [(2, [8, 4]), (3, [3, 6, 3])])
def test_ranks_equal_one_process_and_each_does_its_share(tmp_path, world, queries):
    mp.start_processes(one_rank, (world, str(tmp_path)), world, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    whole, alone = run(), [run(rank, world) for rank in range(world)]
    for key in whole:
        values, gradients, products = map(list, zip(*(results[key] for results in ranks)))
        if key[1]:  # the mean over ranks is the whole batch's
            assert sum(values) / world == pytest.approx(whole[key][0], abs=1e-5)
            theirs = whole[key][1]
            assert products == [36 // world if key[0] == "clip" else 12 * count for count in queries]
        else:       # each rank's value is that of its own rows
            assert values == pytest.approx([results[key][0] for results in alone], abs=1e-5)
            theirs = [sum(parts) / world for parts in zip(*(results[key][1] for results in alone))]
            assert products == [count ** 2 for count in queries]
        torch.testing.assert_close(gradients, [theirs] * world, atol=1e-5, rtol=0)
