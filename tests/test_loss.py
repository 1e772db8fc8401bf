"""β-CAL and L_clip against the authors' numbers, a naive definition, and one process against two."""

import math

import pytest
import torch
import torch.multiprocessing as mp

import loss


def naive_beta_cal(visual, text, owner, scale, beta, kind):
    """SPEC §3's words, pair by pair."""
    v = [x / x.norm() for x in visual]
    t = [x / x.norm() for x in text]
    n = len(v)
    logit = [[scale * v[i].dot(t[j]) for j in range(n)] for i in range(n)]
    total = 0
    if kind == "ce":
        for i in range(n):
            weight = [1 if j == i else beta if owner[j] == owner[i] else 0 for j in range(n)]
            target = [w / sum(weight) for w in weight]
            image_side = [logit[i][j] for j in range(n)]
            text_side = [logit[j][i] for j in range(n)]
            for side in (image_side, text_side):
                log_z = torch.stack(side).exp().sum().log()
                total = total - sum(p * (x - log_z) for p, x in zip(target, side)) / (2 * n)
        return total
    for i in range(n):
        for j in range(n):
            if owner[i] != owner[j]:
                total = total + (1 + logit[i][j].exp()).log()
            else:
                total = total + (1 if i == j else beta) * (1 + (-logit[i][j]).exp()).log()
    owners = owner.tolist()
    return total / (len(set(owners)) * max(owners.count(b) for b in owners)) ** 2


def ragged(dtype=torch.float64, dim=5):
    torch.manual_seed(1)
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
    visual, text = torch.randn(2, len(owner), dim, dtype=dtype)
    return visual.requires_grad_(), text.requires_grad_(), owner, torch.tensor(4.0, dtype=dtype, requires_grad=True)


@pytest.fixture(params=[3, 1024], ids=["tiles of 3", "one tile"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(loss, "TILE", request.param)


def test_beta_cal_golden(golden, tiles):
    for case in torch.load(golden / "beta_cal.pt", weights_only=True):
        mask = case["mask"]
        text, visual = case["text"].clone().requires_grad_(), case["visual"].clone().requires_grad_()
        scale = torch.tensor(case["scale"], requires_grad=True)
        value = loss.beta_cal(visual[mask], text[mask], mask.nonzero()[:, 0], scale, case["beta"], case["kind"])
        value.backward()
        for ours, theirs in [(value, case["loss"]), (text.grad, case["grad_text"]), (visual.grad, case["grad_visual"]), (scale.grad, case["grad_scale"])]:
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_clip_loss_golden(golden):
    case = torch.load(golden / "clip_loss.pt", weights_only=True)
    image, text = case["image"].clone().requires_grad_(), case["text"].clone().requires_grad_()
    scale = torch.tensor(case["scale"], requires_grad=True)
    value = loss.clip_loss(image, text, scale)
    value.backward()
    for ours, theirs in [(value, case["loss"]), (image.grad, case["grad_image"]), (text.grad, case["grad_text"]), (scale.grad, case["grad_scale"])]:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["ce", "bce"])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_beta_cal_equals_the_naive_definition(kind, beta, tiles):
    visual, text, owner, scale = ragged()
    ours = loss.beta_cal(visual, text, owner, scale, beta, kind)
    naive = naive_beta_cal(visual, text, owner, scale, beta, kind)
    torch.testing.assert_close(ours, naive, atol=1e-12, rtol=0)
    for a, b in zip(torch.autograd.grad(ours, (visual, text, scale)), torch.autograd.grad(naive, (visual, text, scale))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_beta_by_hand():
    # two queries of one image, all four similarities equal: every softmax is uniform over 2, every softplus has the same input
    ones, owner = torch.ones(2, 3), torch.tensor([0, 0])
    for beta in (0, 1):
        assert math.isclose(loss.beta_cal(ones, ones, owner, torch.tensor(5.0), beta, "ce"), math.log(2), abs_tol=1e-6)
    softplus = math.log(1 + math.exp(-5))
    assert math.isclose(loss.beta_cal(ones, ones, owner, torch.tensor(5.0), 0, "bce"), 2 * softplus / 4, abs_tol=1e-7)  # siblings ignored
    assert math.isclose(loss.beta_cal(ones, ones, owner, torch.tensor(5.0), 1, "bce"), 4 * softplus / 4, abs_tol=1e-7)  # full positives
    # orthogonal queries, each its own pooled image: β = 0 wants only the diagonal, β = 1 both equally
    eye = torch.eye(2)
    diagonal = -math.log(math.exp(5) / (math.exp(5) + 1))
    assert math.isclose(loss.beta_cal(eye, eye, owner, torch.tensor(5.0), 0, "ce"), diagonal, abs_tol=1e-6)
    assert math.isclose(loss.beta_cal(eye, eye, owner, torch.tensor(5.0), 1, "ce"), diagonal + 5 / 2, abs_tol=1e-6)


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_beta_cal_gradcheck(kind, tiles):
    visual, text, owner, scale = ragged(dim=3)
    assert torch.autograd.gradcheck(lambda v, t, s: loss.beta_cal(v, t, owner, s, 0.4, kind), (visual, text, scale))


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_the_order_of_images_does_not_matter(kind):
    visual, text, owner, scale = ragged()
    rows = torch.cat([(owner == b).nonzero()[:, 0] for b in (2, 0, 3, 1)])
    moved = torch.unique_consecutive(owner[rows], return_inverse=True)[1]
    torch.testing.assert_close(loss.beta_cal(visual[rows], text[rows], moved, scale, 0.4, kind), loss.beta_cal(visual, text, owner, scale, 0.4, kind))


def test_beta_cal_keeps_no_square_matrix(monkeypatch):
    monkeypatch.setattr(loss, "TILE", 16)
    n, sizes = 256, []
    visual, text = torch.randn(2, n, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        for kind in ("ce", "bce"):
            loss.beta_cal(visual, text, torch.arange(n) // 4, torch.tensor(10.0), 0.5, kind)
    assert max(sizes) <= n * 16


# ---- two ranks against one process

def shards():
    """Images [6, 4], queries [12, 4], whose they are (ragged: 8 queries are the first rank's, 4 the second's), a net, a scale."""
    torch.manual_seed(3)
    owner = torch.arange(6).repeat_interleave(torch.tensor([2, 1, 5, 1, 1, 2]))
    return torch.randn(6, 4), torch.randn(12, 4), owner, torch.nn.Linear(4, 5, bias=False), torch.tensor(10.0, requires_grad=True)


LOSSES = ("clip", "ce", "bce")


def value_of(kind, image, query, owner, net, scale, first):
    if kind == "clip":
        return loss.clip_loss(loss.gather(net(image)), loss.gather(net(query[first])), scale)
    visual = net(image[owner]) + net(query).roll(1, 1)
    rows = (visual, net(query), owner)
    return loss.beta_cal(*(loss.gather_queries(*rows) if torch.distributed.is_initialized() else rows), scale, 0.4, kind)


def one_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    image, query, owner, net, scale = shards()
    mine = owner // 3 == rank
    ddp, results = torch.nn.parallel.DistributedDataParallel(net), {}
    for kind in LOSSES:
        net.zero_grad()
        part = owner[mine] - 3 * rank
        first = torch.searchsorted(part, torch.arange(3))
        value = value_of(kind, image[3 * rank:3 * rank + 3], query[mine], part, ddp, scale, first)
        value.backward()
        results[kind] = (value.detach(), net.weight.grad.clone())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    image, query, owner, net, scale = shards()
    for kind in LOSSES:
        net.zero_grad()
        value = value_of(kind, image, query, owner, net, scale, torch.searchsorted(owner, torch.arange(6)))
        value.backward()
        for rank in (0, 1):
            theirs, grad = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[kind]
            torch.testing.assert_close(theirs, value.detach(), atol=1e-5, rtol=0)
            torch.testing.assert_close(grad, net.weight.grad, atol=1e-5, rtol=0)
