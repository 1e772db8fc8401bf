"""Train a β-CLIP.

    torchrun train.py --beta 0.5                       # the built-in scenes; also without torchrun, or a GPU
    torchrun --nproc_per_node 2 train.py --beta 0.5    # two processes: gloo on a CPU, nccl with GPUs
    torchrun --nproc_per_node 4 train.py --beta 0.5 --data sharegpt4v --root DIR       # the paper's recipe
    torchrun train.py --data pairs.jsonl --root IMAGES --val val.jsonl --model RUN/hf  # your own data
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank 0 --master_addr HOST --master_port 29500 train.py …

The scenes start from a small CLIP, as the paper starts from OpenAI's. No hub has it, so the first run trains
it, in runs/base: on single sentences, as OpenAI's saw short captions, and without β-CAL.

A run's folder, --out, which all nodes share, holds checkpoint.pt, log.jsonl, eval.json and hf/, the model for
stock transformers. The same command resumes a run, on as many processes as there are then.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else waiting threads keep a core from others
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval as evaluation
import model as models
from loss import beta_cal, clip_loss

SCENES = dict(model="base", phrases=8, batch_size=64, accum=1, epochs=0.624, lr=1e-3, warmup=0.05, workers=1)
RECIPE = dict(model="openai/clip-vit-base-patch16", phrases=30, batch_size=64, accum=8, epochs=10, lr=1e-5,
              warmup=0.01, workers=8)  # the paper's, for all other data
BASE = "runs/base"
BASE_ARGUMENTS = f"--model scratch --cal none --sentences 1 --epochs 0.64 --out {BASE}".split()
LOG_EVERY = 10  # steps
BAD_STEPS = 3   # steps in a row whose gradient is not finite end a run
MAY_CHANGE_ON_RESUME = {"command", "out", "root", "val", "workers", "save_every", "eval_every",
                        "grad_checkpointing", "compile"}

def arguments(argv=None):
    """Parse and check the command line; what is not given comes from SCENES or RECIPE."""
    parser = data.argument_parser(__doc__)
    add = parser.add_argument
    add("--beta", type=float, default=0.5, help="how far other queries of an image are positives, 0 to 1")
    add("--cal", choices=("ce", "bce", "ce+bce", "none"), default="ce", help="β-CAL: soft, hard, both, none")
    add("--cal-weight", type=float, default=1, help="weight of β-CAL beside L_clip (the paper: 1)")
    add("--global-negatives", action="store_true", help="β-CAL over the queries of all processes")
    add("--sentences", type=int, default=5, help="sentence queries per image; with 0, captions still have 5")
    add("--phrases", type=int, help="phrase queries per image, at most")
    add("--data", default="scenes", help="scenes, sharegpt4v, or what datasets.load_dataset reads")
    add("--columns", metavar="IMAGE,CAPTION", help="the columns of --data and --val")
    add("--root", default="data", help="the folder that image names start from, and of the benchmarks")
    add("--val", help="a file of images and captions to measure retrieval on")
    add("--model", help="base, scratch, or what eval.py's --ckpt takes; its pooler is trained on")
    add("--size", type=int, help="pixels of an image's side, where not the model's own")
    add("--batch-size", type=int, help="images per process and micro-step")
    add("--accum", type=int, help="micro-steps per step")
    add("--epochs", type=float)
    add("--max-steps", type=int, help="end after so many steps; the cosines span them")
    add("--lr", type=float, help="peak learning rate of the backbone; 0 trains the pooler alone")
    add("--lr-pooler", type=float, default=1e-3, help="peak learning rate of the pooler")
    add("--wd", type=float, default=0.01, help="weight decay of matrices")
    add("--max-norm", type=float, default=math.inf, help="clip the gradient (the recipe does not)")
    add("--amp", choices=("bf16", "fp16", "off"), default="bf16" if torch.cuda.is_available() else "off")
    add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--compile", action="store_true", help="torch.compile the transformer layers")
    add("--workers", type=int, help="loader processes")
    add("--seed", type=int, default=0)
    add("--out", help="the run's folder (default: runs/…, named by data, cal, beta and seed)")
    add("--save-every", type=int, default=500, help="steps between checkpoints; an epoch's end makes one too")
    add("--eval-every", type=float, default=1, help="epochs between evaluations")
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**(SCENES if known.data == "scenes" else RECIPE))
    args = parser.parse_args(argv)
    args.command = " ".join(sys.argv[1:] if argv is None else argv)

    may_be_zero = {"beta", "cal_weight", "sentences", "phrases", "lr", "lr_pooler", "wd", "workers", "seed"}
    for name, value in vars(args).items():
        high = {"beta": 1, "max_norm": math.inf}.get(name, 2**63)
        if type(value) in (int, float) and not (0 < value <= high or value == 0 and name in may_be_zero):
            raise data.InputError(f"--{name.replace('_', '-')} {value}: out of range")
    cal = "none" if args.cal == "none" else f"{args.cal}-beta{args.beta:g}"
    args.out = args.out or f"runs/{Path(args.data).stem}-{cal}-seed{args.seed}"
    return args

# ------------------------------------------------------------------------------------------- the step
def cosine(step, total, peak, end, warmup=0, start=0.0):
    """Learning rate of a step, from 0 on: `start` to `peak` in `warmup` steps, then a cosine to `end`."""
    if step < warmup:
        return start + (peak - start) * min(1, step / max(1, warmup - 1))
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def parameter_groups(model, wd):
    """AdamW's groups: backbone and pooler, each with its matrices decayed and the rest not."""
    groups = []
    for part, module in (("backbone", model.clip), ("pooler", model.pooler)):
        params = list(module.parameters())
        groups.append(dict(part=part, params=[p for p in params if p.ndim >= 2], weight_decay=wd))
        groups.append(dict(part=part, params=[p for p in params if p.ndim < 2], weight_decay=0.0))
    return groups

def train_step(net, batches, optimizer, scaler, args):
    """One optimiser step over args.accum micro-batches, from the iterator `batches`.

    Returns losses [accum, 2] (L_clip, β-CAL), the gradient's norm, and whether it is finite.
    """
    model = getattr(net, "module", net)
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
    losses = []
    for micro in range(args.accum):
        batch = next(batches)
        net.require_backward_grad_sync = micro == args.accum - 1  # only then does DDP exchange gradients
        with torch.autocast(batch.pixels.device.type, dtype, enabled=args.amp != "off"):
            cls, text, pooled = net(batch.pixels, batch.texts, batch.owner)         # [B, D], [N, D], [N, D]
        l_clip = clip_loss(cls, text[batch.captions], model.clip.logit_scale.exp())
        l_cal = torch.zeros_like(l_clip)
        if args.cal != "none":
            scale = model.pooler.logit_scale.exp()
            l_cal = sum(beta_cal(pooled, text, batch.owner, scale, args.beta, kind, args.global_negatives)
                        for kind in args.cal.split("+"))
        scaler.scale((l_clip + args.cal_weight * l_cal) / args.accum).backward()
        losses.append(torch.stack([l_clip, l_cal]).detach())

    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm)
    finite = bool(norm.isfinite())     # here, once a step, the host waits for the device
    if finite or scaler.is_enabled():  # else the step changes nothing; a GradScaler sees to it itself
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    for logit_scale in (model.clip.logit_scale, model.pooler.logit_scale):
        logit_scale.data.clamp_(0, math.log(100))
    return torch.stack(losses), norm, finite

def device_batches(loader, device):
    """The loader's batches, on the device but for `owner`; 1 % of images, or ten, may be unreadable."""
    unreadable, drawn = [], 0
    for batch in loader:
        drawn += len(batch.pixels)
        for name in batch.unreadable:
            if name not in unreadable:
                tqdm.write(f"unreadable image, another sample is taken: {name}", file=sys.stderr)
            unreadable.append(name)
        if len(unreadable) > max(10, 0.01 * drawn):
            raise data.InputError(f"{len(unreadable)} of the {drawn} images of this process were unreadable, "
                                  "more than 1 %: see the names above, and --root")
        batch = batch.to(device)
        yield batch._replace(pixels=data.normalize(batch.pixels))

# ------------------------------------------------------------------------------------ the run's folder
def load_checkpoint(path, args):
    """The state that `save_checkpoint` wrote. Raises InputError where the folder holds another run."""
    saved = models.read(path, "args")
    before = saved["args"]
    changed = [f"{name} {before.get(name)} (now {value})" for name, value in vars(args).items()
               if name not in MAY_CHANGE_ON_RESUME and before.get(name) != value]
    if changed:
        raise data.InputError(f"{path} is of another run, with {', '.join(changed)}: choose another --out")
    return saved

def save_checkpoint(path, state):
    """Write beside, flush to disk, rename: at any moment there is a whole checkpoint, old or new."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        temporary.unlink(missing_ok=True)
        raise data.InputError(f"{path} cannot be written, the last stands: {error}") from error

def log(args, **line):
    """Append a line to log.jsonl, NaN as null. A resumed run may repeat a step: its last line counts."""
    line = {name: None if x in (math.inf, -math.inf) or x != x else x for name, x in line.items()}
    with open(Path(args.out, "log.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\n")

def on_signals(handler, worker=None):
    """What SIGTERM and SIGINT do from now on. A loader's `worker` ignores them: the last step needs it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)

# ------------------------------------------------------------------------------------------------ main
def build(args):
    """The model, its tokenizer and the samples that `args` name."""
    source = BASE if args.model == "base" else args.model
    if source == "scratch":
        tokenizer = data.scenes_tokenizer()
        model = models.from_scratch(tokenizer, args.size or data.SIZE)
    else:
        model, tokenizer = evaluation.load(source, args.size)
    if model.context < 248:
        raise data.InputError(f"--model {source}: it reads {model.context} tokens, training needs 248")
    if evaluation.is_main() and args.cal != "none":
        which = "its pooler is trained on" if model.has_trained_pooler else "a fresh pooler"
        print(f"{source}: {which}", file=sys.stderr)
    model.has_trained_pooler = args.cal != "none"
    model.pooler.requires_grad_(model.has_trained_pooler)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # which would cut a layer in two
        model.wrap_layers(torch.compile)
    if args.grad_checkpointing:
        model.wrap_layers(lambda layer: partial(checkpoint, layer, use_reentrant=False))

    queries = (args.sentences, args.phrases if model.has_trained_pooler else 0), args.seed
    if args.data == "scenes":
        return model, tokenizer, data.Scenes(model.image_size, *queries)
    file = Path(args.root, data.SHAREGPT4V) if args.data == "sharegpt4v" else args.data
    return model, tokenizer, data.Captions(file, args.root, model.image_size, *queries, args.columns)

def evaluate_and_export(model, tokenizer, benches, args, step, epoch):
    """Measure, log, and write hf/, a model for stock transformers -> {bench: {metric: per cent}}."""
    results = {name: evaluation.evaluate(model, tokenizer, name, args.root, args.columns) for name in benches}
    model.train()
    if evaluation.is_main():
        log(args, step=step, epoch=epoch, eval=results)
        try:
            models.export(model, tokenizer, Path(args.out, "hf"), command=args.command,
                          base=args.model, table=evaluation.table(results))
        except Exception as error:  # safetensors has its own for a full disk
            raise data.InputError(f"{args.out}/hf cannot be written: {error}") from error
    return results

@data.user_errors()
def main(argv=None):
    args = arguments(argv)

    # ---- processes, model, data
    device = evaluation.init_processes()
    if args.model == "base" and not Path(BASE, "eval.json").is_file():  # which is written last
        main(BASE_ARGUMENTS)
    torch.manual_seed(args.seed)  # the same on every rank
    (rank, world), path = evaluation.rank_and_world(), Path(args.out, "checkpoint.pt")
    saved = load_checkpoint(path, args) if path.is_file() else {}
    model, tokenizer, samples = build(args)
    model.to(device)
    benches = ["scenes"] if args.data == "scenes" else evaluation.present(args.root)
    benches += [args.val] if args.val else []
    if rank == 0 and not benches:
        print(f"nothing will be measured: no --val, no benchmark under {args.root}", file=sys.stderr)

    # ---- positions are in images seen, so that the number of processes may change
    per_step = args.batch_size * world * args.accum
    if len(samples) < args.batch_size * world:
        raise data.InputError(f"--batch-size {args.batch_size} x {world}: only {len(samples)} samples")
    steps = min(max(1, int(args.epochs * len(samples) / per_step)), args.max_steps or math.inf)
    step, seen, total = saved.get("step", 0), saved.get("seen", 0), saved.get("total", steps * per_step)
    if saved and saved["world"] != world and rank == 0:
        print(f"resumed on {world} processes, was {saved['world']}: a step is now {per_step} images, "
              f"L_clip contrasts over {args.batch_size * world}", file=sys.stderr)

    # ---- optimiser
    optimizer = torch.optim.AdamW(parameter_groups(model, args.wd), betas=(0.9, 0.98), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    parts = dict(model=model, optimizer=optimizer, scaler=scaler)
    try:
        for name, part in parts.items() if saved else ():
            part.load_state_dict(saved[name])
    except (RuntimeError, ValueError) as error:
        raise data.InputError(f"--out {args.out} holds a run of another model: {error}") from error
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model

    # ---- what is done between steps
    def save():
        if rank == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(path, state | dict(args=vars(args), step=step, seen=seen, total=total,
                                               world=world, evaluate=evaluate))

    def crosses(epochs):
        return seen // (epochs * len(samples)) > (seen - per_step) // (epochs * len(samples))

    evaluate = saved.get("evaluate", True)  # before the first step too: what is broken shows at once
    if not saved:
        path.parent.mkdir(parents=True, exist_ok=True)
        save()
    del saved  # as large as model and optimiser

    # ---- the loop
    left = math.ceil((total - seen) / per_step)
    order = data.batches(len(samples), args.batch_size, seen, seen + left * per_step, rank, world, args.seed)
    collate = partial(data.collate, tokenizer=tokenizer, pack=models.pack, captions_only=args.cal == "none")
    loader = DataLoader(samples, batch_sampler=order, num_workers=args.workers, collate_fn=collate,
                        worker_init_fn=partial(on_signals, signal.SIG_IGN), pin_memory=device.type == "cuda")
    warmup = int(args.warmup * len(samples) / per_step)
    progress = tqdm(total=step + left, initial=step, disable=rank > 0, dynamic_ncols=True)
    received, bad, skipped, clock, logged = [], 0, 0, time.perf_counter(), seen
    with progress as bar, contextlib.closing(device_batches(loader, device)) as batches:  # ends its processes
        while True:
            if evaluate:
                on_signals(signal.SIG_DFL)  # the step is saved: this may be interrupted
                results = evaluate_and_export(model, tokenizer, benches, args, step, seen / len(samples))
                clock, logged = time.perf_counter(), seen
            if seen >= total:
                break
            on_signals(lambda number, _: received.append(number))  # a step may not

            now, end = seen / per_step, total / per_step  # in steps
            lr = cosine(now, end, args.lr, 1e-2 * args.lr, warmup, 1e-4 * args.lr)
            lr_pooler = cosine(now, end, args.lr_pooler, 0.1 * args.lr_pooler)
            for group in optimizer.param_groups:
                group["lr"] = lr if group["part"] == "backbone" else lr_pooler
            losses, norm, finite = train_step(net, batches, optimizer, scaler, args)
            step, seen = step + 1, seen + per_step
            bar.update()

            last, stop = seen >= total, torch.tensor(max(received, default=0))
            if world > 1:
                dist.all_reduce(stop, dist.ReduceOp.MAX)  # a signal may reach one rank alone
            skipped += not finite
            bad = 0 if finite or scaler.is_enabled() else bad + 1
            if step % LOG_EVERY == 0 or last or bad == BAD_STEPS:
                l_clip, l_cal = evaluation.sum_over_ranks(losses.mean(0) / world).tolist()
            if bad == BAD_STEPS:
                raise data.InputError(f"step {step}: the gradient is not finite, {bad} steps in a row "
                                      f"(L_clip {l_clip:g}, β-CAL {l_cal:g}): try a lower --lr")
            if rank == 0 and (step % LOG_EVERY == 0 or last):
                speed = (seen - logged) / (time.perf_counter() - clock)
                clock, logged = time.perf_counter(), seen
                bar.set_postfix_str(f"L_clip {l_clip:.3f} β-CAL {l_cal:.3f} lr {lr:.1e} {speed:.0f} img/s")
                log(args, step=step, epoch=seen / len(samples), l_clip=l_clip, l_cal=l_cal,
                    loss=l_clip + args.cal_weight * l_cal, scale=model.clip.logit_scale.exp().item(),
                    pooler_scale=model.pooler.logit_scale.exp().item(), lr=lr, lr_pooler=lr_pooler,
                    grad_norm=norm.item(), skipped=skipped, images_per_s=speed,
                    peak_gib=torch.cuda.max_memory_allocated() / 2**30)

            evaluate = last or crosses(args.eval_every)
            if evaluate or stop or step % args.save_every == 0 or crosses(1):
                save()
            if stop:
                name = signal.Signals(stop.item()).name
                tqdm.write(f"{name}: stopped after step {step}; the same command resumes", file=sys.stderr)
                raise SystemExit(128 + stop.item())
    if rank == 0:
        Path(args.out, "eval.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{args.out}\n{evaluation.HEADER}\n{evaluation.table(results)}")
    evaluation.sum_over_ranks(torch.zeros(1))  # the others wait for hf/

if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
