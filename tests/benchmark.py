"""What is fast here, as ratios against plain baselines that stand in this file; run by hand, not by pytest.

    python tests/benchmark.py --only text losses    # these parts, on a CPU
    python tests/benchmark.py --device cuda         # all, with training steps of ViT-B/16 and ViT-L/14

The sides of a line are measured in turn (A B A B …); medians are shown. Weights and tokens are random. The
lengths are real, but that no phrase has over 8 tokens (really 12): this is kind to the padded side.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))                # the scripts are no package
os.environ |= {"HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is given back
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

import data
import eval as evaluation
import loss
import model as models
import train
from test_loss import Made

SIZES = {  # patch, D, width and layers of the image tower and of the text tower
    "ViT-B/16": (16, 512, (768, 12), (512, 12)), "ViT-L/14": (14, 768, (1024, 24), (768, 12)),
    "small": (16, 256, (256, 4), (256, 4)), "narrow": (112, 64, (64, 2), (64, 12))}

def build(name, device="cpu"):
    patch, dim, *towers = SIZES[name]
    vision, text = (dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                         num_attention_heads=width // 64) for width, layers in towers)
    config = CLIPConfig(projection_dim=dim, vision_config=vision | {"patch_size": patch}, text_config=text)
    model = models.BetaCLIP(CLIPModel(config)).to(device)
    model.has_trained_pooler = True
    return model

def batch(images=64, phrases=30, seed=0):
    """The loader's batch of random images: of each a caption, five sentences, 24 to 30 phrases."""
    rng, samples = random.Random(seed), []
    pixels = torch.randint(256, (3, 224, 224), dtype=torch.uint8)
    text = lambda level, length: ([49406, *rng.choices(range(49406), k=round(length) - 2), 49407], level)
    for _ in range(images):
        queries = [text("caption", min(222, max(60, rng.gauss(130, 30))))]
        queries += [text("sentence", min(60, max(8, rng.gauss(25, 7)))) for _ in range(5)]
        lengths = rng.choices(range(3, 9), (25, 38, 22, 9, 4, 2), k=max(0, phrases - rng.randrange(7)))
        samples.append((pixels, queries + [text("phrase", length) for length in lengths], []))
    with mock.patch.object(data, "tokenize", lambda tokenizer, texts, limits: texts):
        return data.collate(samples, None, models.pack)

def in_turn(repeats, *functions):
    """Median seconds of each function, called in turn, `repeats` times after a warm-up."""
    seconds = [[] for _ in functions]
    for function, own in [*zip(functions, seconds)] * (repeats + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        own.append(time.perf_counter() - start)
    return [sorted(own[1:])[repeats // 2] for own in seconds]

def fresh(function, *tasks):
    """The function of each task (its arguments), all at once, each in a process of its own -> list."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(len(tasks), torch.set_num_threads, [torch.get_num_threads()]) as pool:
        return pool.starmap(function, tasks, chunksize=1)

def line(what, ours="", plain="", ratio="", least=None, most=None):
    """A line of the table; `least` or `most` is the goal of its ratio."""
    goal = f">= {least:,}" if least else f"<= {most:,}" if most else ""
    met = "" if not goal else "met" if (ratio >= least if least else ratio <= most) else "MISSED"
    numbers = (x if x == "" else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (ours, plain, ratio))
    print("{:<62}{:>8}{:>8}{:>8}  {:<9}{}".format(what, *numbers, goal, met).rstrip(), flush=True)

def padded(model, batch):
    """Yields the embeddings of each level, padded to the longest caption, or to the longest phrase."""
    tokens, _, offsets, rows, _ = batch.texts.to("cpu")
    starts, lengths, text = offsets[:-1][rows], offsets.diff()[rows], model.clip.text_model
    for level in range(3):
        own, alike = batch.level == level, (batch.level == 2) == (level == 2)
        place = torch.arange(lengths[alike].max())
        ids = tokens[(starts[own, None] + place).clamp(max=len(tokens) - 1)]       # [n, L], any after EOS
        x = text.embeddings.token_embedding(ids.to(model.clip.device))
        x = x + text.embeddings.position_embedding(place.to(model.clip.device))    # [n, L, W]
        for layer in text.encoder.layers:
            x = layer(x, attention_mask=None, is_causal=True)
        x = text.final_layer_norm(x)[torch.arange(len(x)), lengths[own] - 1]       # [n, W]
        yield model.clip.text_projection(x)

def text(device, repeats):
    """The packed text tower: its tokens, its operations, its seconds."""
    narrow, drawn, tokens = build("narrow"), batch(), []
    mlp = narrow.clip.text_model.encoder.layers[0].mlp
    mlp.register_forward_hook(lambda mlp, given, out: tokens.append(len(out)))
    stub = lambda query, key, value, *_: query + (key + value)[:len(query)]
    as_on_a_gpu = mock.patch.multiple(models, attend=stub, CPU_TOKENS=10**9)
    with as_on_a_gpu, torch.autocast("cpu"), Made() as made:
        narrow.encode_text(drawn.texts).sum().backward()
    with mock.patch.object(models, "pack", list):
        real = sum(map(len, {tuple(text) for text in batch().texts}))
    line("text tokens of 64 images, K = 36: processed, real", *tokens, real, tokens[0] / real, most=1)
    line("operations of 12 text layers, both passes, no attention", ratio=made.operations, most=2500)

    def run(encode):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            for embeddings in encode():  # each level by itself: the same work in less memory
                embeddings.float().sum().backward()
    model, texts = build("ViT-B/16" if device == "cuda" else "small", device), drawn.texts.to(device)
    packed = lambda: run(lambda: [model.encode_text(texts)])
    ours, plain = in_turn(repeats, packed, lambda: run(lambda: padded(model, drawn)))
    line("encode_text, both passes, against padded levels: s", ours, plain, plain / ours, least=2.5)
    if device == "cuda":  # told that there is none, `attend` takes the texts of one length at a time
        ours, groups = in_turn(repeats, packed, mock.patch.object(torch.Tensor, "is_cuda", False)(packed))
        line("encode_text, varlen_attn against groups: s", ours, groups, groups / ours)

def host(device, repeats):
    """What the host does before the text tower's first product, on a device that computes nothing."""
    model = build("narrow", "meta")
    model.encode_image, model.text_layer = lambda _: (None, None), mock.Mock(side_effect=InterruptedError)

    def step():
        one, = train.device_batches([drawn], "meta")
        with contextlib.suppress(InterruptedError):
            model(one.pixels, one.texts, one.owner)
    for images, goal in ((64, 2), (512, 15)):
        drawn = batch(images)
        seconds, = in_turn(max(20, repeats), step)
        line(f"host, loader to first product, {images} images: ms", ratio=1e3 * seconds, most=goal)

def dense(visual, text, owner, scale, beta, kind="ce"):
    """β-CAL with its targets written out; L_clip at β = 0."""
    same = (owner[:, None] == owner).to(visual.device)                             # [N, N]
    weight = (beta * same).fill_diagonal_(1)
    logits = scale * loss.unit(visual) @ loss.unit(text).T
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, same.float(), weight.masked_fill(~same, 1))
    target = weight / weight.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

def cal(device, kind, function, images=256):
    """A forward and backward pass of β-CAL, K = 36, D = 512, ready to be called."""
    inputs = [torch.randn(36 * images, 512, device=device, requires_grad=True) for _ in range(2)]
    scale, owner = torch.tensor(14.3, device=device), torch.arange(images).repeat_interleave(36)
    return lambda: torch.autograd.grad(function(*inputs, owner, scale, 0.5, kind), inputs)

def cost(kind, function, images=256, folder=None, rank=0):
    """β-CAL in a fresh process, alone or one of four: GiB above its inputs, 10⁹ multiply-adds."""
    if folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
        function = partial(function, global_negatives=True)
    cal("cpu", kind, function, images=2)()  # what a first call allocates for good is no one's extra
    run, status = cal("cpu", kind, function, images), Path("/proc/self/status")
    kib = lambda name: int(status.read_text().split(name)[1].split()[0])
    before = kib("VmRSS:")
    run()
    extra = kib("VmHWM:") - before
    with FlopCounterMode(display=False) as counter:
        run()
    return extra / 2**20, counter.get_total_flops() / 2e9

def losses(device, repeats):
    """beta_cal against `dense`; shared out; and where `dense` would need terabytes."""
    for kind, name in (("ce", "soft"), ("bce", "hard")):
        ours, plain = in_turn(repeats, cal(device, kind, loss.beta_cal), cal(device, kind, dense))
        line(f"β-CAL, {name}, N = 9,216, D = 512, against dense: s", ours, plain, plain / ours, least=1)
        (ours, alone), (plain, _) = fresh(cost, (kind, loss.beta_cal), (kind, dense))
        line("the same on a CPU: extra peak memory, GiB", ours, plain, plain / ours, least=8)
        with tempfile.TemporaryDirectory() as folder:
            ranks = fresh(cost, *((kind, loss.beta_cal, 64, folder, rank) for rank in range(4)))
        ours = max(products for _, products in ranks)
        line("the same on one of 4 ranks, alone: 10⁹ multiply-adds", ours, alone, ours / alone, most=0.35)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            seconds, = in_turn(1, cal(device, kind, loss.beta_cal, 4096))
            line("the same, N = 147,456: s, GiB", seconds, torch.cuda.max_memory_allocated() / 2**30)

@torch.inference_mode()
def regions(device, repeats):
    """FG-OVD's protocol on 40 images, with as many boxes an image, and texts a box, as there."""
    model, goal = (build("ViT-B/16", device), 10) if device == "cuda" else (build("small"), 4)
    noise = Image.frombytes("RGB", (160, 120), os.urandom(160 * 120 * 3)).resize((640, 480))
    noise.save(jpeg := io.BytesIO(), "JPEG", quality=90)  # about as large as a photograph's
    load = lambda _: Image.open(io.BytesIO(jpeg.getvalue()))
    run = partial(evaluation.fine_grained, model.eval(), data.scenes_tokenizer(), load)
    boxes = data.scene_boxes("val")[:4 * 40]
    rows = [(box["image"], box["box"], box[split]) for box in boxes for split in evaluation.FGOVD]
    rows = random.Random(0).sample(rows, 266)
    singly = lambda: [run([image], {"": [(0, *rest)]}) for image, *rest in rows]
    ours, plain = (266 / s for s in in_turn(repeats, lambda: run(range(40), {"": rows}), singly))
    line("FG-OVD: boxes/s, against one at a time", ours, plain, ours / plain, least=goal)

def trainer(device, name, *options):
    """Model, optimizer, scaler and args, for train.train_step."""
    precision = "bf16" if device == "cuda" else "off"
    args = train.arguments(["--data", "sharegpt4v", "--accum", "1", "--amp", precision, *options])
    model = build(name, device).train()
    optimizer = torch.optim.AdamW(train.parameter_groups(model, args.wd), lr=1e-5, fused=True)
    return model, optimizer, torch.amp.GradScaler(device, enabled=False), args

def plain_step(model, batch, optimizer):
    """A step as the authors do it: padded levels, full attention in the last layer, dense targets."""
    vision = model.clip.vision_model
    x = vision.pre_layrnorm(vision.embeddings(data.normalize(batch.pixels)))
    for layer in vision.encoder.layers:
        x = checkpoint(models.image_layer, layer, x, use_reentrant=False)
    x = model.clip.visual_projection(vision.post_layernorm(x))                     # [B, 1 + P, D]
    text = torch.cat([*padded(model, batch)])[batch.level.argsort(stable=True).argsort()]
    pooled = model.pooler(text, batch.owner, x[:, 1:])                             # [N, D], as text
    l_clip = dense(x[:, 0], text[batch.captions], torch.arange(len(x)), model.clip.logit_scale.exp(), 0)
    (l_clip + dense(pooled, text, batch.owner, model.pooler.logit_scale.exp(), 0.5)).backward()
    optimizer.step()
    optimizer.zero_grad()

def steps(device, repeats):
    """A whole training step of a small ViT, on a CPU."""
    (model, optimizer, *rest), drawn = trainer("cpu", "small"), batch(16)
    step = lambda: train.train_step(model, train.device_batches([drawn], "cpu"), optimizer, *rest)
    ours, plain = in_turn(repeats, step, lambda: plain_step(model, drawn, optimizer))
    line("training step of 4 + 4 layers, 16 images, against plain: s", ours, plain, plain / ours, least=6)

def training(device, rate, name, images, phrases, *options, count=10):
    """A line of train.train_step, another batch at each step; what is recomputed does not count as done."""
    evaluation.init_processes()
    model, optimizer, scaler, args = trainer(device, name, *options)
    drawn = [batch(images if seed else 8, phrases, seed) for seed in range(count + 3)]
    if device == "cuda":
        drawn = [one._replace(pixels=one.pixels.pin_memory()) for one in drawn]
    step = partial(train.train_step, model, train.device_batches(drawn, device), optimizer, scaler, args)
    with FlopCounterMode(display=False) as counter, mock.patch.object(args, "amp", "off"):
        step()  # of 8 images; in bf16, varlen_attn is not counted
    if args.compile:
        model.wrap_layers(torch.compile)
    if args.grad_checkpointing:
        model.wrap_layers(lambda layer: partial(checkpoint, layer, use_reentrant=False))
    what = " ".join([f"{name}, {images} images, {phrases} phrases", *options])
    try:
        step()
        seconds, = in_turn(count, step)
    except torch.OutOfMemoryError:
        return print(f"{what:<62}out of memory", flush=True)
    speed, gib = images / seconds, torch.cuda.max_memory_allocated() / 2**30
    done = speed * counter.get_total_flops() / 8
    print(f"{what:<62}{speed:>8.1f}{done / 1e12:>9.2f}{done / rate:>8.0%}{gib:>8.1f}", flush=True)

def trainings(device, repeats):
    """On a GPU: training by images and options; the goal is 40 % for ViT-B/16, 64 images, 30 phrases."""
    if device == "cuda":
        a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
        rate = 20 * 8192**3 / in_turn(repeats, lambda: [a @ b for _ in range(10)])[0]
        print(f"{f'training; a matmul: {rate / 1e12:.0f} TFLOP/s':<62}images/s  TFLOP/s   share     GiB")
        for name in ("ViT-B/16", "ViT-L/14"):
            for phrases, *options in ((30,), (0,), (30, "--grad-checkpointing"), (30, "--compile")):
                for images in (64, 256, 512):
                    fresh(training, (device, rate, name, images, phrases, *options))

if __name__ == "__main__":
    parts = {part.__name__: part for part in (text, host, losses, regions, steps, trainings)}
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    evaluation.init_processes()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{f'{name}, torch {torch.__version__}':<62}    ours   plain   ratio  goal")
    for part in args.only:
        parts[part](args.device, args.repeats)
