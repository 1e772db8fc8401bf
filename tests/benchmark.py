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
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are not a package
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # freed memory returns to the operating system
import torch
import torch.distributed as dist
from test_loss import dense_beta_cal
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
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


# ---- what is measured: models, batches, clocks ---------------------------------------------------
def build(name, device="cpu"):
    """A BetaCLIP of a size of SIZES, with random weights and the pooler in use."""
    patch_size, dim, vision_size, text_size = SIZES[name]
    configs = []
    for width, layers in (vision_size, text_size):
        configs.append({"hidden_size": width, "intermediate_size": 4 * width,
                        "num_hidden_layers": layers, "num_attention_heads": width // 64})
    vision, text = configs
    config = CLIPConfig(projection_dim=dim, vision_config=vision | {"patch_size": patch_size},
                        text_config=text)
    model = models.BetaCLIP(CLIPModel(config)).to(device)
    model.use_pooler = True
    return model


def batch(images=64, phrases=30, seed=0):
    """A batch of random images, each with a caption, five sentences and 24 to 30 phrases."""
    rng = random.Random(seed)
    pixels = torch.randint(256, (3, 224, 224), dtype=torch.uint8)

    def random_query(level, length):
        inner = rng.choices(range(49406), k=round(length) - 2)
        return [49406, *inner, 49407], level

    samples = []
    for _ in range(images):
        queries = [random_query("caption", min(222, max(60, rng.gauss(130, 30))))]
        for _ in range(5):
            queries.append(random_query("sentence", min(60, max(8, rng.gauss(25, 7)))))
        count = max(0, phrases - rng.randrange(7))
        for length in rng.choices(range(3, 9), (25, 38, 22, 9, 4, 2), k=count):
            queries.append(random_query("phrase", length))
        samples.append((pixels, queries, []))
    with mock.patch.object(data, "tokenize", lambda tokenizer, texts, limits: texts):
        return data.collate(samples, None)


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


def run_in_fresh_processes(function, *tasks):
    """Call function(*task) for all tasks in parallel, each in a new process. Returns the results."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(len(tasks), torch.set_num_threads, [torch.get_num_threads()]) as pool:
        return pool.starmap(function, tasks, chunksize=1)


def print_row(what, ours="", baseline=""):
    """Print a line of the table; with two numbers also how many times ours is less."""
    ratio = "" if ours == "" or baseline == "" else f"{baseline / ours:.2f} x"
    ours, baseline = (number if number == "" else f"{number:.3g}" for number in (ours, baseline))
    print(f"{what:<66}{ours:>10}{baseline:>10}{ratio:>10}".rstrip(), flush=True)


# ---- text encoder --------------------------------------------------------------------------------
def encode_padded(model, one_batch):
    """Encode the texts as the authors do: captions and sentences padded to the longest caption, and
    phrases to the longest phrase. Yields the embeddings of each level."""
    texts = one_batch.texts.to("cpu")
    starts = texts.offsets[:-1][texts.distinct]
    lengths = texts.offsets.diff()[texts.distinct]
    is_phrase = one_batch.level.cpu() == data.LEVELS.index("phrase")
    text_model = model.clip.text_model
    for level in range(len(data.LEVELS)):
        chosen = one_batch.level.cpu() == level
        alike = is_phrase if data.LEVELS[level] == "phrase" else ~is_phrase
        positions = torch.arange(lengths[alike].max())
        index = (starts[chosen, None] + positions).clamp(max=len(texts.tokens) - 1)
        ids = texts.tokens[index].to(model.clip.device)                     # [n, L], any after EOS
        x = text_model.embeddings.token_embedding(ids)                      # [n, L, C]
        x = x + text_model.embeddings.position_embedding(positions.to(model.clip.device))
        for layer in text_model.encoder.layers:
            x = layer(x, attention_mask=None, is_causal=True)
        eos = x[torch.arange(len(x)), lengths[chosen] - 1]                  # [n, C]
        yield model.clip.text_projection(text_model.final_layer_norm(eos))


def measure_text(device, repeats):
    """Packed texts: how many tokens are processed, and the time of both passes."""
    one_batch = batch()
    model = build("ViT-B/16" if device == "cuda" else "small", device)
    processed = []
    mlp = model.clip.text_model.encoder.layers[0].mlp
    hook = mlp.register_forward_hook(lambda mlp, inputs, output: processed.append(len(output)))
    texts = one_batch.texts.to(device)
    run_packed(model, texts, device)
    hook.remove()
    print_row("text tokens of 64 images, K = 36: processed, distinct",
              processed[0], len(one_batch.texts.tokens))

    def run_padded():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            for embeddings in encode_padded(model, one_batch):  # in turn, for less memory
                embeddings.float().sum().backward()

    ours, baseline = time_alternately(repeats, lambda: run_packed(model, texts, device), run_padded)
    print_row("encode_text, both passes, against padded levels: s", ours, baseline)
    if device == "cuda":
        by_length = mock.patch.object(models, "GPU_CAPABILITY", (7, 5))(run_packed)
        ours, baseline = time_alternately(repeats, lambda: run_packed(model, texts, device),
                                          lambda: by_length(model, texts, device))
        print_row("encode_text, varlen_attn against one length at a time: s", ours, baseline)


def run_packed(model, texts, device):
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        embeddings = model.encode_text(texts)
    embeddings.float().sum().backward()


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


def cost_of_cal(form, is_dense, images=256, folder=None, rank=0):
    """Peak memory above the inputs, in GiB, and 10⁹ multiply-adds of β-CAL in this new process,
    which is alone or, with a folder to meet in, one of four."""
    function = dense_beta_cal if is_dense else loss.beta_cal
    if folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                world_size=4)

        def function(*args):
            return loss.beta_cal(*args, global_negatives=True)

    make_cal("cpu", form, function, images=2)()  # one-time allocations are not counted
    run = make_cal("cpu", form, function, images)
    before = read_memory("VmRSS")
    run()
    peak = read_memory("VmHWM") - before
    with FlopCounterMode(display=False) as counter:
        run()
    return peak, counter.get_total_flops() / 2e9


def read_memory(name):
    """A figure of this process's memory, in GiB, as Linux tells it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) / 2**20


def measure_losses(device, repeats):
    """beta_cal against its definition: in one process, in four, and where the latter cannot fit."""
    for form in ("ce", "bce"):
        name = f"β-CAL {form.upper()}, N = 9,216, D = 512"
        ours, baseline = time_alternately(repeats, make_cal(device, form, loss.beta_cal),
                                          make_cal(device, form, dense_beta_cal))
        print_row(f"{name}, against dense: s", ours, baseline)
        costs = run_in_fresh_processes(cost_of_cal, (form, False), (form, True))
        print_row(f"{name}, peak memory on a CPU: GiB", costs[0][0], costs[1][0])
        with tempfile.TemporaryDirectory() as folder:
            tasks = [(form, False, 64, folder, rank) for rank in range(4)]
            of_ranks = run_in_fresh_processes(cost_of_cal, *tasks)
        most = max(products for _, products in of_ranks)
        print_row(f"{name}, on one of 4 ranks, alone: 10⁹ multiply-adds", most, costs[0][1])
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            seconds = time_alternately(1, make_cal(device, form, loss.beta_cal, 4096))[0]
            gib = torch.cuda.max_memory_allocated() / 2**30
            print_row(f"β-CAL {form.upper()}, N = 147,456: s; {gib:.1f} GiB", seconds)


# ---- training steps ------------------------------------------------------------------------------
def make_trainer(device, name, *options):
    """A model and what else `train.train_step` takes, for one micro-step a step."""
    precision = "bf16" if device == "cuda" else "off"
    args = train.parse_args(["--data", "sharegpt4v", "--accum", "1", "--amp", precision, *options])
    model = build(name, device).train()
    if args.grad_checkpointing:
        model.call = checkpoint_layer
    optimizer = torch.optim.AdamW(train.parameter_groups(model, args.wd), lr=1e-5, fused=True)
    return model, optimizer, torch.amp.GradScaler(device, enabled=False), args


def checkpoint_layer(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def plain_step(model, one_batch, optimizer):
    """A step in the authors' way: padded levels, full attention in the last layer, activations
    recomputed, dense targets."""
    vision = model.clip.vision_model
    mean, std = model.mean_and_std[:, :, None, None]
    pixels = (one_batch.pixels.float() / 255 - mean) / std
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in vision.encoder.layers:
        x = checkpoint_layer(layer, x, None)
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


def time_training(device, rate, name, images, phrases, *options):
    """Print images/s and the share of the matrix-product rate of training steps on a GPU, each with
    a new batch. Recomputed layers do not count as work."""
    loss.join_processes()
    model, optimizer, scaler, args = make_trainer(device, name, *options)
    count = 10
    batches = []
    for seed in range(count + 3):
        one_batch = batch(images if seed else 8, phrases, seed)
        batches.append(one_batch._replace(pixels=one_batch.pixels.pin_memory()))
    moved = train.device_batches(batches, torch.device(device))

    def step():
        train.train_step(model, moved, optimizer, scaler, args)

    call = model.call
    model.call = models.call
    args.amp = "off"  # varlen_attn is not counted
    with FlopCounterMode(display=False) as counter:
        step()  # of 8 images
    model.call = call
    args.amp = "bf16"
    what = " ".join([f"{name}, {images} images, {phrases} phrases", *options])
    try:
        step()
        seconds = time_alternately(count, step)[0]
    except torch.OutOfMemoryError:
        print(f"{what:<66}out of memory", flush=True)
        return
    speed = images / seconds
    work = speed * counter.get_total_flops() / 8
    gib = torch.cuda.max_memory_allocated() / 2**30
    figures = f"{speed:>10.1f}{work / 1e12:>10.1f}{work / rate:>10.0%}{gib:>8.1f}"
    print(f"{what:<66}{figures}", flush=True)


def measure_training(device, repeats):
    """Training on a GPU, by model, images and options."""
    if device != "cuda":
        return
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)

    def multiply():
        for _ in range(10):
            a @ b

    rate = 20 * 8192**3 / time_alternately(repeats, multiply)[0]
    title = f"training; matrix products: {rate / 1e12:.0f} TFLOP/s"
    print(f"{title:<66}{'images/s':>10}{'TFLOP/s':>10}{'share':>10}{'GiB':>8}")
    for name in ("ViT-B/16", "ViT-L/14"):
        for phrases, *options in ((30,), (0,), (30, "--grad-checkpointing")):
            for images in (64, 256, 512):
                task = (device, rate, name, images, phrases, *options)
                run_in_fresh_processes(time_training, task)


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
