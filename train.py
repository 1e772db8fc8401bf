"""Train a β-CLIP.

    torchrun train.py --beta 0.5                             # built-in scenes; all of it works on a CPU too
    python train.py --beta 0.5                               # the same, without a launcher
    torchrun --nproc_per_node 2 train.py --beta 0.5          # two processes: gloo on a CPU, nccl with GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank 0 --master_addr HOST --master_port 29500 train.py …   # on HOST
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank 1 --master_addr HOST --master_port 29500 train.py …   # on the other

A run lives in its folder (--out, on a disk that all nodes share): checkpoint.pt and the one before, previous.pt; best.pt;
log.jsonl; the tokenizer; and at the end eval.json and hf/. Started again with the same arguments it goes on where its
checkpoint stands, on as many processes as there are then. SIGTERM and SIGINT let it finish the step, save, and exit
with 128 + the signal's number.
"""

import argparse
import collections
import contextlib
import json
import math
import os
import resource
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval as evaluation
import model as models
from loss import beta_cal, clip_loss, gather, gather_queries

DEFAULTS = {  # by --data; sharegpt4v is the recipe of SPEC §4
    "scenes": dict(model="tiny", sentences=5, phrases=8, batch_size=64, accum=1, epochs=1,
                   lr=1e-3, lr_pooler=1e-3, warmup=0.05, workers=2),
    "sharegpt4v": dict(model="openai/clip-vit-base-patch16", sentences=5, phrases=30, batch_size=64, accum=8, epochs=10,
                       lr=1e-5, lr_pooler=1e-3, warmup=0.01, workers=8),
}
LOG_EVERY = 10                           # steps
BAD_STEPS = {"fp16": 30, "bf16": 3, "off": 3}  # in a row, by --amp, that end a run; fp16's scaler looks for its scale so
TIMEOUT = timedelta(minutes=30)          # without a word from another rank
HOW = {"out", "root", "resume", "workers", "save_every", "eval_every", "grad_checkpointing", "compile"}  # a resumed run may change these


def arguments(argv=None):
    """Parse and check the command line; what is not given comes from DEFAULTS[--data]."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.fail
    parser.add_argument("--beta", type=float, default=0.5, help="how far other queries of an image count as positives, 0 to 1")
    parser.add_argument("--cal", choices=("ce", "bce", "none"), default="ce", help="β-CAL's form: soft, hard, or plain CLIP")
    parser.add_argument("--sentences", type=int, help="sentence queries an image; the caption is made of them, with 0 of 5")
    parser.add_argument("--phrases", type=int, help="phrase queries an image, at most")
    parser.add_argument("--batch-size", type=int, help="images a process and micro-step")
    parser.add_argument("--accum", type=int, help="micro-steps a step")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--max-steps", type=int, help="end, schedules included, after so many steps")
    parser.add_argument("--lr", type=float, help="peak learning rate of the backbone")
    parser.add_argument("--lr-pooler", type=float, help="peak learning rate of the pooler")
    parser.add_argument("--wd", type=float, default=0.01, help="weight decay of matrices")
    parser.add_argument("--amp", choices=("bf16", "fp16", "off"), default="bf16" if torch.cuda.is_available() else "off")
    parser.add_argument("--clip", type=float, help="clip the gradient to this norm (the recipe does not)")
    parser.add_argument("--global-negatives", action="store_true", help="β-CAL over the queries of all processes, not of each its own")
    parser.add_argument("--grad-checkpointing", action="store_true", help="less memory: compute the activations of all layers but the last again in the backward pass")
    parser.add_argument("--compile", action="store_true", help="torch.compile all layers but the last")
    parser.add_argument("--workers", type=int, help="loader processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the run's folder (default: runs/…, named by data, cal, beta and seed)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction,
                        help="go on with the run in --out; default: where it holds one with these arguments")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints; the end of an epoch makes one too")
    parser.add_argument("--eval-every", type=float, default=1, help="epochs between evaluations on the benchmarks that are there")
    parser.add_argument("--model", help="'tiny', or 'wide', twice as wide, from scratch; or a Hugging Face CLIP: its hub name or a folder")
    parser.add_argument("--data", default="scenes", help="scenes, sharegpt4v, or a file: JSON (lines) of {image, caption}")
    parser.add_argument("--root", default="data", help="the folder that image names start from, and where sharegpt4v's file and the benchmarks lie")
    args = parser.parse_args(argv)
    for name, value in DEFAULTS["scenes" if args.data == "scenes" else "sharegpt4v"].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if not 0 <= args.beta <= 1:
        data.fail(f"--beta {args.beta}: must be from 0 to 1")
    least = dict(sentences=0, phrases=0, batch_size=1, accum=1, epochs=1e-9, max_steps=1, lr=0, lr_pooler=0, wd=0, clip=1e-9,
                 workers=0, seed=0, save_every=1, eval_every=1e-9)
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**63:
            data.fail(f"--{name.replace('_', '-')} {value}: must be a number, at least {low}")
    if args.data != "scenes" and not annotation_file(args).is_file():
        data.fail(f"--data {args.data}: there is no file {annotation_file(args)}" + (
            ": get it from https://huggingface.co/datasets/Lin-Chen/ShareGPT4V" if args.data == "sharegpt4v" else "; scenes and sharegpt4v are the names"))
    if args.data != "scenes" and not Path(args.root).is_dir():
        data.fail(f"--root {args.root}: there is no such folder")
    if args.out is None:
        args.out = f"runs/{Path(args.data).stem}-{args.cal}" + (f"-beta{args.beta:g}" if args.cal != "none" else "") + f"-seed{args.seed}"
    return args


def annotation_file(args):
    return Path(args.root) / data.SHAREGPT4V if args.data == "sharegpt4v" else Path(args.data)


def cosine(step, total, peak, end, warmup=0, start=0.0):
    """Learning rate of a step, counted from 0: `start` … `peak` linearly in `warmup` steps, then a half cosine to `end`."""
    if step < warmup:
        return start + (peak - start) * min(1, step / max(1, warmup - 1))
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def parameter_groups(model, wd):
    """AdamW's groups: backbone and pooler, each with its matrices decayed and the rest not (SPEC §4)."""
    groups = []
    for part, module in (("backbone", model.clip), ("pooler", model.pooler)):
        trained = [p for p in module.parameters() if p.requires_grad]
        groups.append(dict(part=part, params=[p for p in trained if p.ndim >= 2], weight_decay=wd))
        groups.append(dict(part=part, params=[p for p in trained if p.ndim < 2], weight_decay=0.0))
    return [group for group in groups if group["params"]]


def save(path, state, previous=None):
    """Write beside, flush to disk, rename: at any moment `path` is the old checkpoint or the new one, whole.

    With `previous` the old one is kept there; between the two renames it stands there alone.
    """
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        beside.unlink(missing_ok=True)
        data.fail(f"{path} cannot be written, what was saved before stands: {data.reason(error)}")


def log_of(path, done):
    """The run's log, open for more; what came after step `done` goes, it is run, and logged, again."""
    lines = path.read_text().splitlines(keepends=True) if done and path.exists() else []
    whole = [(line, json.loads(line)) for line in lines if line.endswith("}\n")]  # a kill may have torn the last
    with open(path.with_suffix(".tmp"), "w") as file:
        file.writelines(line for line, read in whole if read["step"] < done or read["step"] == done and "eval" not in read)
    os.replace(path.with_suffix(".tmp"), path)
    return open(path, "a", buffering=1)


def outlive_signals(_):
    """In a loader's process: Ctrl-C and a cluster's SIGTERM reach all processes, and the step that ends needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


@contextlib.contextmanager
def on_signals(act):
    """Within, SIGTERM and SIGINT do nothing but `act`, on their number."""
    before = {number: signal.signal(number, lambda number, _: act(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv=None):
    args = arguments(argv)

    # ---- processes and devices
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), evaluation.own_device()
    cuda = device.type == "cuda"
    if world > 1:  # gloo beside nccl: what the hosts tell each other does not wait for the GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    torch.manual_seed(args.seed)  # the same on every rank: DDP starts from equal weights

    # ---- the run's folder
    out, checkpoint = Path(args.out), Path(args.out) / "checkpoint.pt"
    chosen = {name: value for name, value in vars(args).items() if name not in HOW}
    try:
        saved = models.read(models.newest(out)) if models.newest(out).is_file() else None
    except (OSError, ValueError) as error:
        data.fail(f"--out {out}: {error}")
    start = dict(step=0, seen=0, total=0, best=-1.0, evaluate=args.data != "scenes", world=world, samples=0)
    if saved and not {"args", "model", "optimizer", "scaler", "rng", *start} <= saved.keys():
        data.fail(f"--out {out}: its checkpoint.pt is none of train.py's, or of an older one: choose another --out")
    if saved and saved["args"] != chosen:
        then = saved["args"]
        other = ", ".join(f"{name} {then.get(name)} (now {value})" for name, value in chosen.items() if then.get(name) != value)
        data.fail(f"--out {out} holds another run: {other}: choose another --out")
    if saved and args.resume is False:
        data.fail(f"--no-resume: --out {out} holds a run: remove it, or choose another --out")
    if args.resume and not saved:
        data.fail(f"--resume: there is no run in --out {out}")

    # ---- model and data
    try:
        if args.model in models.SCRATCH:
            tokenizer = data.scenes_tokenizer()
            model = models.tiny(tokenizer, models.SCRATCH[args.model])
        else:
            model = models.pretrained(args.model)
            tokenizer = models.load_tokenizer(args.model, model)
    except Exception as error:  # torch's, transformers' and safetensors' have no ancestor in common
        data.fail(f"--model {args.model}: {data.reason(error)}")
    if model.context < data.CONTEXT:
        data.fail(f"--model {args.model}: it reads {model.context} tokens, training needs {data.CONTEXT}; a CLIP's usual 77 are stretched")
    model = model.to(device, memory_format=torch.channels_last)
    wanted = dict(sentences=args.sentences, phrases=args.phrases, seed=args.seed, captions_only=args.cal == "none")
    if args.data == "scenes":
        samples = data.Scenes(model.image_size, **wanted)
    else:
        samples = data.Captions(annotation_file(args), args.root, model.image_size, **wanted)
    if len(samples) < args.batch_size * world:
        data.fail(f"--batch-size {args.batch_size} on {world} processes: there are only {len(samples)} samples")
    # All positions are in images seen, so that a run can go on with steps of another size.
    per_step = args.batch_size * world * args.accum
    steps = max(1, int(args.epochs * len(samples) / per_step))
    start |= dict(total=min(steps, args.max_steps or steps) * per_step, samples=len(samples))
    start |= {name: saved[name] for name in start if saved}
    seen, total, best = start["seen"], start["total"], start["best"]
    if start["samples"] != len(samples):
        data.fail(f"--data {args.data} has {len(samples)} samples, had {start['samples']} when the run in --out {out} was saved: choose another --out")
    if world > 1:
        dist.all_gather_object(everywhere := [None] * world, start)
        if everywhere != [start] * world:
            data.fail(f"--out {out}: process {rank} does not find there what others find: it must lie on a disk that all nodes share")
    left = max(0, math.ceil((total - seen) / per_step))
    if start["world"] != world and rank == 0:
        print(f"resumed on {world} processes, was {start['world']}: a step is now {per_step} images, L_clip contrasts over {args.batch_size * world}, "
              f"{left} steps are left; the order of samples and the schedules go on by images seen", file=sys.stderr)

    # ---- optimiser
    model.pooler.requires_grad_(args.cal != "none")
    optimizer = torch.optim.AdamW(parameter_groups(model, args.wd), lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    resumed = bool(saved)
    if resumed:
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except Exception as error:
            data.fail(f"--out {out} holds a run of another model than --model {args.model} is now, or a broken one: {data.reason(error)}")
        scaler.load_state_dict(saved["scaler"])
        if start["world"] == world:
            torch.set_rng_state(saved["rng"][rank][0])
            if cuda and saved["rng"][rank][1:]:
                torch.cuda.set_rng_state(saved["rng"][rank][1])
    del saved  # as large as model and optimiser
    for layer in model.layers:
        if args.grad_checkpointing:
            layer.forward = partial(activation_checkpoint, layer.forward, use_reentrant=False)
        if args.compile:
            layer.compile()
    net = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if world > 1 else model
    autocast = torch.autocast(device.type, torch.float16 if args.amp == "fp16" else torch.bfloat16, enabled=args.amp != "off")
    scales = [model.clip.logit_scale, model.pooler.logit_scale]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    # ---- what is written
    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(out)
            log = log_of(out / "log.jsonl", start["step"])
        except (OSError, ValueError) as error:
            data.fail(f"--out {out}: {error}")

    def write(**line):
        try:
            log.write(json.dumps({name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in line.items()}) + "\n")
        except OSError as error:
            data.fail(f"{out / 'log.jsonl'} cannot be written, the last checkpoint stands: {error}")

    def keep(step, evaluate):
        """Save a checkpoint; `evaluate`: whether an evaluation is due then. All ranks call it, rank 0 writes."""
        rng = [[torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]] * world
        if world > 1:
            dist.all_gather_object(rng, rng[rank])
        if rank == 0:
            save(checkpoint, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), rng=rng,
                                  args=chosen, config=model.clip.config.to_json_string(use_diff=False), step=step, seen=seen, total=total,
                                  best=best, world=world, samples=len(samples), evaluate=evaluate), out / "previous.pt")

    def measure(step):
        """Evaluate on the benchmarks that are there; the best checkpoint, by the mean of R@1 and accuracies, is kept."""
        nonlocal best
        results = {}
        with on_signals(lambda number: sys.exit(128 + number)):  # the step is saved, and the evaluation comes again
            for bench in ["scenes"] if args.data == "scenes" else evaluation.BENCHES[1:]:
                try:
                    results[bench] = evaluation.evaluate(model, tokenizer, bench, args.root)
                except evaluation.Missing as why:
                    if rank == 0 and bench not in missing:
                        tqdm.write(f"note: {bench} is not measured: {why}", file=sys.stderr)
                    missing.add(bench)
        figures = [score for scores in results.values() for metric, score in scores.items() if not metric.endswith(("@5", "@10"))]
        if rank == 0:
            write(step=step, epoch=seen / len(samples), eval=results)
            if figures and sum(figures) / len(figures) > best:
                best = sum(figures) / len(figures)
                save(out / "best.pt", models.read(models.newest(out)))
        return results

    def ready():
        """Training mode, and TF32, which an evaluation does without."""
        model.train()
        if cuda:
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
            torch.cuda.reset_peak_memory_stats()

    def ends(epochs):
        """Whether the last step ended a stretch of so many epochs."""
        return seen // (epochs * len(samples)) > (seen - per_step) // (epochs * len(samples))

    evaluate = start["evaluate"]  # before the first step too: what is broken in a benchmark shows at once
    if not resumed:
        keep(0, evaluate)  # from here on the folder is this run's
    bar = tqdm(total=start["step"] + left, initial=start["step"], disable=rank > 0, dynamic_ncols=True)
    unreadable, drawn, missing = collections.Counter(), 0, set()
    bad, over = torch.zeros(2, device=device)  # steps in a row whose gradient was not finite; steps since these were too many
    skipped = torch.zeros((), device=device)
    results = measure(start["step"]) if evaluate else {}
    ready()
    came, due, evaluate, since, before = [], False, False, time.perf_counter(), seen

    batches = data.Batches(len(samples), args.batch_size, seen, seen + left * per_step, rank, world, args.seed)
    loader = DataLoader(samples, batch_sampler=batches, collate_fn=partial(data.collate, tokenizer=tokenizer),
                        num_workers=args.workers, pin_memory=cuda, worker_init_fn=outlive_signals,
                        generator=torch.Generator())  # its own: at each start it takes a number, and the global one is resumed
    with on_signals(came.append), contextlib.closing(batch for batch in loader) as loader:  # closed, its processes end
        for step in range(start["step"] + 1, start["step"] + left + 1):
            at = seen / per_step
            lr = cosine(at, total / per_step, args.lr, 1e-2 * args.lr, int(args.warmup * len(samples) / per_step), 1e-4 * args.lr)
            lr_pooler = cosine(at, total / per_step, args.lr_pooler, 0.1 * args.lr_pooler)
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
                        pixels = pixels.to(device, non_blocking=True, memory_format=torch.channels_last)
                        cls, text, pooled = net(pixels, texts, owner)                                # [B, D], [N, D], [N, D]
                    counts = owner.bincount()                                                        # [B] queries of each image
                    captions = text[(counts.cumsum(0) - counts).to(device, non_blocking=True)]       # [B, D] their first rows
                    l_clip = clip_loss(gather(cls), gather(captions), scales[0].exp())
                    l_cal = torch.zeros_like(l_clip)
                    if args.cal != "none":
                        rows = gather_queries(pooled, text, owner) if args.global_negatives else (pooled, text, owner)
                        l_cal = beta_cal(*rows, scales[1].exp(), args.beta, args.cal)
                    scaler.scale((l_clip + l_cal) / args.accum).backward()
                clip_part, cal_part = clip_part + l_clip.detach() / args.accum, cal_part + l_cal.detach() / args.accum
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if args.clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, args.clip, norm)
            # where found_inf is 1 the fused AdamW changes nothing, as it does for a scaler, and nobody waits for the GPU
            optimizer.found_inf = (~norm.isfinite()).float()
            bad = torch.where(bad < BAD_STEPS[args.amp], (bad + 1) * optimizer.found_inf, bad)  # too many stay so until they are seen
            over, skipped = over + (bad >= BAD_STEPS[args.amp]), skipped + optimizer.found_inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for scale in scales:
                    scale.clamp_(0, math.log(100))
            seen += per_step
            bar.update()

            # ---- between two steps: log, stop, save, evaluate
            stop = torch.tensor(max(came, default=0))
            if world > 1:
                dist.all_reduce(stop, dist.ReduceOp.MAX)  # a signal may reach one rank alone; this is between the hosts
            last = step == start["step"] + left
            evaluate |= last or ends(args.eval_every)
            due |= evaluate or bool(stop) or step % args.save_every == 0 or ends(1)
            if due or step % LOG_EVERY == 0:
                # β-CAL is of this rank's queries, as in the recipe
                figures = torch.stack([bad, over, skipped, clip_part, cal_part, norm, scales[0].exp(), scales[1].exp()]).tolist()
                streak, ago, lost, clip, cal, grad_norm, clip_scale, pool_scale = figures
                if rank == 0 and (last or step % LOG_EVERY == 0):
                    now = time.perf_counter()
                    speed = (seen - before) / (now - since)
                    since, before = now, seen
                    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    write(step=step, epoch=seen / len(samples), loss=clip + cal, clip=clip, cal=cal, clip_scale=clip_scale, pool_scale=pool_scale,
                          lr=lr, lr_pooler=lr_pooler, grad_norm=grad_norm, skipped=int(lost), images_per_s=speed, peak_gib=peak / 2**30, unreadable=unreadable.total())
                    bar.set_postfix_str(f"clip {clip:.3f} cal {cal:.3f} scales {clip_scale:.1f} {pool_scale:.1f} lr {lr:.1e} {speed:.0f} img/s")
                if streak >= BAD_STEPS[args.amp] or streak and last and not scaler.is_enabled():
                    first = step - int(streak + max(0, ago - 1)) + 1
                    at = seen - (step - first + 1) * per_step
                    batch, = data.Batches(len(samples), per_step, at, at + per_step, seed=args.seed)
                    data.fail(f"step {first}: the gradient is not finite, for {streak:g} steps in a row, which changed nothing (clip {clip:g}, cal {cal:g} in step {step}); "
                              f"its samples: {sorted(index for _, index in batch)}; try a lower --lr, --lr-pooler, or --clip 1")
                sound = not streak or scaler.is_enabled()  # never save what has just failed; fp16's scaler skips steps as a habit
                if due and sound:
                    keep(step, evaluate)
                    due = False
                if stop:
                    if world > 1:
                        dist.all_reduce(stop, dist.ReduceOp.MAX)  # till rank 0 has written
                    if rank == 0:
                        print(f"{signal.Signals(stop.item()).name}: stopped after step {step}, which {'is' if not due else 'is not'} saved; "
                              "the same command goes on from the last checkpoint", file=sys.stderr)
                    raise SystemExit(128 + stop.item())
                if evaluate and sound:
                    results = measure(step)
                    ready()
                    evaluate, since, before = False, time.perf_counter(), seen
    bar.close()

    # ---- the table
    if rank == 0:
        try:
            models.export(model, tokenizer, out / "hf")
            (out / "eval.json").write_text(json.dumps(results, indent=1) + "\n")
        except Exception as error:  # safetensors has its own
            data.fail(f"--out {out}: the run is saved, hf/ or eval.json is not: {data.reason(error)}")
        print(f"{out}\n{evaluation.HEADER}\n{evaluation.table(results)}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
