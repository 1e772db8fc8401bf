"""Train a β-CLIP.

    torchrun train.py --beta 0.5                             # built-in scenes; all of it works on a CPU too
    python train.py --beta 0.5                               # the same, without a launcher
    torchrun --nproc_per_node 2 train.py --beta 0.5          # two processes: gloo on a CPU, nccl with GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank 0 --master_addr HOST --master_port 29500 train.py …   # on HOST
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank 1 --master_addr HOST --master_port 29500 train.py …   # on the other

A run lives in its folder (--out, on a disk that all nodes share): checkpoint.pt, log.jsonl, the tokenizer, and at the end eval.json. Started
again with the same arguments it goes on where its checkpoint stands.
"""

import argparse
import collections
import contextlib
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval as evaluation
import model as models
from loss import beta_cal, clip_loss, gather

DEFAULTS = {  # by --data; sharegpt4v is the recipe of SPEC §4
    "scenes": dict(model="tiny", sentences=5, phrases=8, batch_size=64, accum=1, epochs=1,
                   lr=1e-3, lr_pooler=1e-3, warmup=0.05, workers=2),
    "sharegpt4v": dict(model="openai/clip-vit-base-patch16", sentences=5, phrases=30, batch_size=64, accum=8, epochs=10,
                       lr=1e-5, lr_pooler=1e-3, warmup=0.01, workers=8),
}
LOG_EVERY = 10     # steps
SAVE_EVERY = 500   # steps


def arguments(argv=None):
    """Parse and check the command line; what is not given comes from DEFAULTS[--data]."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.fail
    parser.add_argument("--beta", type=float, default=0.5, help="how far other queries of an image count as positives, 0 to 1")
    parser.add_argument("--cal", choices=("ce", "bce", "none"), default="ce", help="β-CAL's form: soft, hard, or plain CLIP")
    parser.add_argument("--sentences", type=int, help="sentence queries an image (the caption is made of them)")
    parser.add_argument("--phrases", type=int, help="phrase queries an image, at most")
    parser.add_argument("--batch-size", type=int, help="images a process and micro-step")
    parser.add_argument("--accum", type=int, help="micro-steps a step")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--max-steps", type=int, help="end, schedules included, after so many steps")
    parser.add_argument("--lr", type=float, help="peak learning rate of the backbone")
    parser.add_argument("--lr-pooler", type=float, help="peak learning rate of the pooler")
    parser.add_argument("--wd", type=float, default=0.01, help="weight decay of matrices")
    parser.add_argument("--amp", choices=("bf16", "fp16", "off"), default="bf16" if torch.cuda.is_available() else "off")
    parser.add_argument("--workers", type=int, help="loader processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the run's folder (default: runs/…, named by data, cal, beta and seed)")
    parser.add_argument("--model", help="'tiny', from scratch; or a Hugging Face CLIP: its hub name or a folder")
    parser.add_argument("--data", default="scenes", help="scenes, sharegpt4v, or a file: JSON (lines) of {image, caption}")
    parser.add_argument("--root", default="data", help="the folder that image names start from, and sharegpt4v's file lies in")
    args = parser.parse_args(argv)
    for name, value in DEFAULTS["scenes" if args.data == "scenes" else "sharegpt4v"].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if not 0 <= args.beta <= 1:
        data.fail(f"--beta {args.beta}: must be from 0 to 1")
    least = dict(sentences=0, phrases=0, batch_size=1, accum=1, epochs=1e-9, max_steps=1, lr=0, lr_pooler=0, wd=0, workers=0, seed=0)
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**63:
            data.fail(f"--{name.replace('_', '-')} {value}: must be a number, at least {low}")
    file = Path(args.root) / data.SHAREGPT4V if args.data == "sharegpt4v" else Path(args.data)
    if args.data != "scenes" and not file.is_file():
        data.fail(f"--data {args.data}: there is no file {file}" + (
            ": get it from https://huggingface.co/datasets/Lin-Chen/ShareGPT4V" if args.data == "sharegpt4v" else "; scenes and sharegpt4v are the names"))
    if args.data != "scenes" and not Path(args.root).is_dir():
        data.fail(f"--root {args.root}: there is no such folder")
    if args.out is None:
        args.out = f"runs/{Path(args.data).stem}-{args.cal}" + (f"-beta{args.beta:g}" if args.cal != "none" else "") + f"-seed{args.seed}"
    return args


def cosine(step, total, peak, end, warmup=0, start=0.0):
    """Learning rate of a step, counted from 0: `start` … `peak` linearly in `warmup` steps, then a half cosine to `end`."""
    if step < warmup:
        return start + (peak - start) * step / max(1, warmup - 1)
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def parameter_groups(model, wd):
    """AdamW's groups: backbone and pooler, each with its matrices decayed and the rest not (SPEC §4)."""
    groups = []
    for part, module in (("backbone", model.clip), ("pooler", model.pooler)):
        trained = [p for p in module.parameters() if p.requires_grad]
        groups.append(dict(part=part, params=[p for p in trained if p.ndim >= 2], weight_decay=wd))
        groups.append(dict(part=part, params=[p for p in trained if p.ndim < 2], weight_decay=0.0))
    return [group for group in groups if group["params"]]


def save(path, state):
    """Write beside, flush to disk, rename: at any moment `path` is either the old checkpoint or the new one, whole."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def main(argv=None):
    args = arguments(argv)

    # ---- processes and devices
    rank, local, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        data.fail(f"process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: lower --nproc_per_node")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(args.seed)  # the same on every rank: DDP starts from equal weights

    # ---- the run's folder
    out, checkpoint = Path(args.out), Path(args.out) / "checkpoint.pt"
    chosen = {name: value for name, value in vars(args).items() if name not in ("out", "workers")} | {"world": world}
    try:
        saved = models.read(checkpoint) if checkpoint.is_file() else None
    except (OSError, ValueError) as error:
        data.fail(f"--out {out}: {error}")
    if saved and not {"args", "step", "optimizer"} <= saved.keys():
        data.fail(f"--out {out}: its checkpoint.pt is none of train.py's: choose another --out")
    if saved and saved["args"] != chosen:
        then = saved["args"]
        other = ", ".join(f"{name} {then.get(name)} (now {value})" for name, value in chosen.items() if then.get(name) != value)
        data.fail(f"--out {out} holds another run: {other}: choose another --out")

    # ---- model and data
    try:
        if args.model == "tiny":
            tokenizer = data.scenes_tokenizer()
            model = models.tiny(tokenizer).to(device)
        else:
            model = models.pretrained(args.model).to(device)
            tokenizer = models.load_tokenizer(args.model)
    except OSError as error:
        data.fail(f"--model {args.model}: {str(error).splitlines()[0]}")
    wanted = dict(sentences=args.sentences, phrases=args.phrases, seed=args.seed, captions_only=args.cal == "none")
    if args.data == "scenes":
        samples = data.Scenes(model.image_size, **wanted)
    else:
        file = Path(args.root) / data.SHAREGPT4V if args.data == "sharegpt4v" else Path(args.data)
        samples = data.Captions(file, args.root, model.image_size, **wanted)
    if len(samples) < args.batch_size * world:
        data.fail(f"--batch-size {args.batch_size} on {world} processes: there are only {len(samples)} samples")
    per_step = args.batch_size * world * args.accum
    total = max(1, int(args.epochs * len(samples) / per_step))
    total = min(total, args.max_steps or total)
    warmup = int(args.warmup * len(samples) / per_step)
    done = saved["step"] if saved else 0
    batches = data.Batches(len(samples), args.batch_size, done * args.accum, total * args.accum, rank, world, args.seed)
    loader = iter(DataLoader(samples, batch_sampler=batches, collate_fn=partial(data.collate, tokenizer=tokenizer),
                             num_workers=args.workers, pin_memory=cuda))

    # ---- optimiser
    model.pooler.requires_grad_(args.cal != "none")
    optimizer = torch.optim.AdamW(parameter_groups(model, args.wd), lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
    net = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if world > 1 else model
    autocast = torch.autocast(device.type, torch.float16 if args.amp == "fp16" else torch.bfloat16, enabled=args.amp != "off")
    scales = [model.clip.logit_scale, model.pooler.logit_scale]

    def state(step):
        return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step,
                    rng=torch.get_rng_state(), args=chosen, config=model.clip.config.to_json_string(use_diff=False))

    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(out)
            # what came after the checkpoint is run, and logged, again; a line torn by a kill is among it
            lines = (out / "log.jsonl").read_text().splitlines(keepends=True) if saved else []
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= done]
            log = open(out / "log.jsonl", "w", buffering=1)
            if not saved:
                save(checkpoint, state(0))  # from here on the folder is this run's
        except (OSError, ValueError) as error:
            data.fail(f"--out {out}: {error}")
        log.writelines(kept)
    bar = tqdm(range(done, total), initial=done, total=total, disable=rank > 0, dynamic_ncols=True)
    since, seen = time.perf_counter(), done
    unreadable, drawn = collections.Counter(), 0

    model.train()
    for step in bar:
        lr = cosine(step, total, args.lr, 1e-2 * args.lr, warmup, 1e-4 * args.lr)
        lr_pooler = cosine(step, total, args.lr_pooler, 0.1 * args.lr_pooler)
        for group in optimizer.param_groups:
            group["lr"] = lr if group["part"] == "backbone" else lr_pooler

        clip_part = cal_part = 0
        for micro in range(args.accum):
            pixels, tokens, lengths, owner, failed = next(loader)
            drawn += len(pixels)
            for name in failed:
                unreadable[name] += 1
                if unreadable[name] == 1:
                    tqdm.write(f"unreadable image, another sample is taken: {name}", file=sys.stderr)
            if failed and unreadable.total() > max(10, 0.01 * drawn):
                data.fail(f"{unreadable.total()} of the {drawn} images of this process were unreadable, more than 1 %: see the names above, and --root")
            texts = tokens.split(lengths.tolist())
            inner = net.no_sync() if world > 1 and micro < args.accum - 1 else contextlib.nullcontext()
            with inner:  # gradients of the ranks meet on the last micro-step only
                with autocast:
                    cls, text, pooled = net(pixels.to(device, non_blocking=True), texts, owner)  # [B, D], [N, D], [N, D]
                first = torch.searchsorted(owner, torch.arange(len(pixels)))                     # [B] rows of the captions
                captions = text[first.to(device, non_blocking=True)]                             # [B, D]
                l_clip = clip_loss(gather(cls), gather(captions), scales[0].exp())
                l_cal = torch.zeros_like(l_clip)
                if args.cal != "none":
                    l_cal = beta_cal(pooled, text, owner, scales[1].exp(), args.beta, args.cal)
                scaler.scale((l_clip + l_cal) / args.accum).backward()
            clip_part, cal_part = clip_part + l_clip.detach() / args.accum, cal_part + l_cal.detach() / args.accum
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for scale in scales:
                scale.clamp_(0, math.log(100))

        if rank == 0 and ((step + 1) % LOG_EVERY == 0 or step + 1 == total):
            # β-CAL is of this rank's queries, as in the recipe
            clip, cal, clip_scale, pool_scale = torch.stack([clip_part, cal_part, scales[0].exp(), scales[1].exp()]).tolist()
            now = time.perf_counter()
            line = dict(step=step + 1, epoch=(step + 1) * per_step / len(samples), loss=clip + cal, clip=clip, cal=cal,
                        clip_scale=clip_scale, pool_scale=pool_scale, lr=lr, lr_pooler=lr_pooler,
                        images_per_s=(step + 1 - seen) * per_step / (now - since), unreadable=unreadable.total())
            since, seen = now, step + 1
            log.write(json.dumps(line) + "\n")
            bar.set_postfix_str(f"clip {clip:.3f} cal {cal:.3f} scales {clip_scale:.1f} {pool_scale:.1f} lr {lr:.1e} "
                                f"{line['images_per_s']:.0f} img/s")
        if rank == 0 and ((step + 1) % SAVE_EVERY == 0 or step + 1 == total):
            save(checkpoint, state(step + 1))
    bar.close()

    # ---- the table
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        models.export(model, tokenizer, out / "hf")
        results = {}
        for bench in ["scenes"] if args.data == "scenes" else evaluation.BENCHES[1:]:
            with contextlib.suppress(evaluation.Missing):
                results[bench] = evaluation.evaluate(model, tokenizer, bench, args.root)
        (out / "eval.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{out}\n{evaluation.HEADER}\n{evaluation.table(results)}")


if __name__ == "__main__":
    main()
