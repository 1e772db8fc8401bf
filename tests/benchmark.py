"""Measure speed and memory against simple baselines, which are in this file. Run by hand.

    python tests/benchmark.py                               # all parts for a CPU
    python tests/benchmark.py --only text --repeats 3
    python tests/benchmark.py --device cuda                 # also steps of ViT-B/16 and ViT-L/14

Both sides of a line are timed alternately (A B A B …), and medians are printed. Weights and tokens
are random. Text lengths follow the real data, except that phrases have at most 8 tokens (really up
to 12 or so), which favours the padded baselines.
"""

import argparse
import multiprocessing
import os
import random
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are not a package
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # freed memory returns to the operating system
import torch
from test_loss import dense_beta_cal
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPModel

import data
import loss
import model as models
import train

SIZES = {  # patch size, D, width and layers of the image encoder and of the text encoder
    "ViT-B/16": (16, 512, (768, 12), (512, 12)),
    "ViT-L/14": (14, 768, (1024, 24), (768, 12)),
    "small": (16, 256, (256, 4), (256, 4)),
}
recompute = partial(checkpoint, use_reentrant=False)


# ---- what is measured: models, batches, clocks ---------------------------------------------------
def build(name, device="cpu"):
    """A BetaCLIP of a size of SIZES, with random weights and the pooler in use."""
    patch_size, dim, vision_size, text_size = SIZES[name]
    vision, text = (
        {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
         "num_attention_heads": width // 64} for width, layers in (vision_size, text_size))
    config = CLIPConfig(projection_dim=dim, vision_config=vision | {"patch_size": patch_size},
                        text_config=text)
    model = models.BetaCLIP(CLIPModel(config)).to(device)
    model.use_pooler = True
    return model


def batch(images=64, phrases=30, seed=0):
    """A batch of random images, each with a caption, five sentences and 24 to 30 phrases."""
    rng = random.Random(seed)
    texts = []
    queries_per_image = []
    for _ in range(images):
        lengths = [min(222, max(60, rng.gauss(130, 30)))]
        lengths += [min(60, max(8, rng.gauss(25, 7))) for _ in range(5)]
        count = max(0, phrases - rng.randrange(7))
        lengths += rng.choices(range(3, 9), (25, 38, 22, 9, 4, 2), k=count)
        for length in lengths:
            texts.append([49406, *rng.choices(range(49406), k=round(length) - 2), 49407])
        queries_per_image.append(len(lengths))
    counts = torch.tensor(queries_per_image)
    captions = counts.cumsum(0) - counts
    image_of_query = torch.arange(images).repeat_interleave(counts)
    number = torch.arange(len(texts)) - captions[image_of_query]    # of a query, in its image
    level = (number >= 1).int() + (number >= 6)
    pixels = torch.randint(256, (images, 3, 224, 224), dtype=torch.uint8)
    return data.Batch(pixels, models.pack(texts), image_of_query, level, captions, read_errors=[])


def time_alternately(repeats, *functions):
    """The median time of each function, in seconds, called alternately after a warm-up."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, its_times in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            its_times.append(time.perf_counter() - start)
    return [sorted(its_times[1:])[repeats // 2] for its_times in times]


def run_in_fresh_process(function, *args):
    """Call a function in a new process. Returns its result."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, torch.set_num_threads, [torch.get_num_threads()]) as pool:
        return pool.apply(function, args)


def print_row(what, ours, baseline):
    """Print a line of the table: two numbers, and how many times ours is less."""
    print(f"{what:<66}{ours:>10.3g}{baseline:>10.3g}{baseline / ours:>8.2f} x", flush=True)


# ---- text encoder --------------------------------------------------------------------------------
def encode_padded(model, one_batch):
    """Encode the texts as the authors do: captions and sentences padded to the longest caption, and
    phrases to the longest phrase. Yields the embeddings of each level."""
    texts = one_batch.texts
    starts = texts.offsets[:-1][texts.distinct]
    lengths = texts.offsets.diff()[texts.distinct]
    text_model = model.clip.text_model
    for level, name in enumerate(data.LEVELS):
        chosen = one_batch.level == level
        longest = lengths[chosen].max() if name == "phrase" else lengths.max()
        positions = torch.arange(longest, device=lengths.device)
        index = (starts[chosen, None] + positions).clamp(max=len(texts.tokens) - 1)
        x = text_model.embeddings.token_embedding(texts.tokens[index])  # [n, L, C], any after EOS
        x = x + text_model.embeddings.position_embedding(positions)
        for layer in text_model.encoder.layers:
            x = layer(x, attention_mask=None, is_causal=True)
        eos = x[torch.arange(len(x), device=x.device), lengths[chosen] - 1]             # [n, C]
        yield model.clip.text_projection(text_model.final_layer_norm(eos))


def measure_text(device, repeats):
    """Both passes of the text encoder, for packed and for padded texts."""
    one_batch = batch().to(device)
    model = build("ViT-B/16" if device == "cuda" else "small", device)

    def run_packed():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            embeddings = model.encode_text(one_batch.texts)
        embeddings.float().sum().backward()

    def run_padded():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            for embeddings in encode_padded(model, one_batch):  # in turn, for less memory
                embeddings.float().sum().backward()

    ours, baseline = time_alternately(repeats, run_packed, run_padded)
    print_row("encode_text, both passes, against padded levels: s", ours, baseline)
    if device == "cuda":
        run_by_length = mock.patch.object(models, "GPU_CAPABILITY", (7, 5))(run_packed)
        ours, baseline = time_alternately(repeats, run_packed, run_by_length)
        print_row("encode_text, varlen_attn against one length at a time: s", ours, baseline)


# ---- losses --------------------------------------------------------------------------------------
def make_cal(device, form, function, images=256):
    """A function that computes β-CAL and its gradients, for K = 36 and D = 512."""
    visual, text = torch.randn(2, 36 * images, 512, device=device).requires_grad_()
    scale = torch.tensor(14.3, device=device)
    image_of_query = torch.arange(images).repeat_interleave(36)

    def run():
        value = function(visual, text, image_of_query, scale, 0.5, form)
        return torch.autograd.grad(value, (visual, text))
    return run


def peak_memory_of_cal(form, function):
    """Peak memory of β-CAL on the CPU above its inputs, in GiB, in this new process."""
    make_cal("cpu", form, function, images=2)()  # one-time allocations are not counted
    run = make_cal("cpu", form, function)
    before = read_memory("VmRSS")
    run()
    return read_memory("VmHWM") - before


def read_memory(name):
    """A figure of this process's memory, in GiB, as Linux tells it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) / 2**20


def measure_losses(device, repeats):
    """beta_cal against its definition."""
    for form in ("ce", "bce"):
        name = f"β-CAL {form.upper()}, N = 9,216, D = 512, against dense"
        functions = (loss.beta_cal, dense_beta_cal)
        runs = [make_cal(device, form, function) for function in functions]
        print_row(f"{name}: s", *time_alternately(repeats, *runs))
        peaks = [run_in_fresh_process(peak_memory_of_cal, form, function) for function in functions]
        print_row(f"{name}, peak memory on a CPU: GiB", *peaks)


# ---- training steps ------------------------------------------------------------------------------
def make_trainer(device, name, *options):
    """A model and what else `train.train_step` takes, for one micro-step a step."""
    precision = "bf16" if device == "cuda" else "off"
    args = train.parse_args(["--data", "sharegpt4v", "--accum", "1", "--amp", precision, *options])
    model = build(name, device).train()
    if args.grad_checkpointing:
        model.call = recompute
    optimizer = torch.optim.AdamW(train.parameter_groups(model, args.wd), lr=1e-5, fused=True)
    return model, optimizer, torch.amp.GradScaler(device, enabled=False), args


def plain_step(model, one_batch, optimizer):
    """A step in the authors' way: padded levels, full attention in the last layer, activations
    recomputed, dense targets."""
    vision = model.clip.vision_model
    mean, std = model.mean_and_std[:, :, None, None]
    pixels = (one_batch.pixels.float() / 255 - mean) / std
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in vision.encoder.layers:
        x = recompute(layer, x, None)
    x = model.clip.visual_projection(vision.post_layernorm(x))                      # [B, 1 + P, D]
    by_level = torch.cat(list(encode_padded(model, one_batch)))
    text = by_level[one_batch.level.argsort(stable=True).argsort()]                 # [N, D]
    pooled = model.pooler(text, one_batch.image_of_query, x[:, 1:])                 # [N, D]
    l_clip = dense_beta_cal(x[:, 0], text[one_batch.caption_index], torch.arange(len(x)),
                            model.clip.logit_scale.exp(), 0)
    l_cal = dense_beta_cal(pooled, text, one_batch.image_of_query, model.pooler.logit_scale.exp(),
                           0.5)
    (l_clip + l_cal).backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_steps(device, repeats):
    """A training step of a small ViT on a CPU, against the plain step."""
    model, optimizer, scaler, args = make_trainer("cpu", "small")
    one_batch = batch(16)

    def step():
        train.train_step(model, iter([one_batch]), optimizer, scaler, args)

    def run_plain():
        plain_step(model, one_batch, optimizer)

    ours, baseline = time_alternately(repeats, step, run_plain)
    print_row("training step, 4 + 4 layers, 16 images, against plain: s", ours, baseline)


def time_training(name, images, phrases, *options):
    """Print images/s and the peak memory of training steps on a GPU, each with a new batch."""
    device = loss.join_processes()
    model, optimizer, scaler, args = make_trainer("cuda", name, *options)
    count = 10
    batches = []
    for seed in range(1 + count):  # one is to warm up
        one_batch = batch(images, phrases, seed)
        batches.append(one_batch._replace(pixels=one_batch.pixels.pin_memory()))
    moved = train.device_batches(batches, device)

    def step():
        train.train_step(model, moved, optimizer, scaler, args)

    what = " ".join([f"{name}, {images} images, {phrases} phrases", *options])
    try:
        [seconds] = time_alternately(count, step)
    except torch.OutOfMemoryError:
        print(f"{what:<66}out of memory", flush=True)
        return
    gib = torch.cuda.max_memory_allocated() / 2**30
    print(f"{what:<66}{images / seconds:>10.1f}{gib:>10.1f}", flush=True)


def measure_training(device, repeats):
    """Training on a GPU, by model, images and options."""
    if device != "cuda":
        return
    print(f"{'training':<66}{'images/s':>10}{'GiB':>10}")
    for name in ("ViT-B/16", "ViT-L/14"):
        for phrases, *options in ((30,), (0,), (30, "--grad-checkpointing")):
            for images in (64, 256, 512):
                run_in_fresh_process(time_training, name, images, phrases, *options)


PARTS = {"text": measure_text, "losses": measure_losses, "steps": measure_steps,
         "training": measure_training}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    loss.join_processes()
    machine = f"{torch.get_num_threads()} threads"
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{f'{machine}, torch {torch.__version__}':<66}{'ours':>10}{'baseline':>10}{'ratio':>10}")
    for part in args.only:
        PARTS[part](args.device, args.repeats)
