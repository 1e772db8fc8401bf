"""Train β-CLIP.

    torchrun train.py --beta 0.5                    # on the scenes; torchrun and a GPU are optional
    torchrun --nproc_per_node 4 train.py --beta 0.5 --data sharegpt4v --root DIR    # the paper's
    torchrun train.py --data pairs.jsonl --root IMAGES --val val.jsonl              # your own data

A run writes checkpoint.pt, log.jsonl, eval.json, and hf/, the model for stock transformers, to the
folder --out, which all nodes must share. The same command resumes it, on any number of processes.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# before torch is imported: OpenMP's idle threads must not keep the cores from other processes
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import CLIPTokenizer

import data
import eval as evaluation
import model as models
from loss import barrier, beta_cal, clip_loss, join_processes, rank, world_size
from model import BetaCLIP, InputError, command_line, input_errors

FLAGS = {  # name: type or choices, default or (default on scenes, that of the paper's recipe), help
    "beta": (float, 0.5, "weight of the other queries of an image as positives, 0 to 1"),
    "cal": (("ce", "bce", "none"), "ce", "form of β-CAL; none is L_clip only"),
    "cal-weight": (float, 1.0, "weight of β-CAL in the loss"),
    "global-negatives": (bool, False, "have β-CAL contrast with the queries of all processes"),
    "sentences": (int, 5, "maximum of sentence queries per image (0: captions still join 5)"),
    "phrases": (int, (4, 30), "maximum of phrase queries per image"),
    "data": (str, "scenes", "scenes, sharegpt4v, a file, a folder, or a data set on the hub"),
    "columns": (str, None, "IMAGE,CAPTION: the names of the columns of --data and --val"),
    "root": (str, "data", "the folder of images and benchmarks"),
    "val": (str, None, "a file, a folder, or a data set on the hub, to evaluate retrieval on"),
    "model": (str, ("scratch", "openai/clip-vit-base-patch16"), "scratch, or as eval.py --ckpt"),
    "freeze": (("image", "text"), None, "an encoder that is not trained"),
    "batch-size": (int, 64, "images per process and micro-step"),
    "accum": (int, (1, 8), "micro-steps per step"),
    "epochs": (float, (1.0, 10.0), "length of the run"),
    "max-steps": (int, None, "length of the run in steps, if that is shorter"),
    "lr": (float, (1e-3, 1e-5), "peak rate of the backbone; if 0, only the rest is trained"),
    "lr-pooler": (float, 1e-3, "peak rate of the pooler and of new parameters"),
    "warmup": (float, (0.05, 0.01), "epochs in which lr rises; at most a tenth of the run"),
    "wd": (float, 0.01, "weight decay of matrices"),
    "amp": (("bf16", "fp16", "off"), None, "default: bf16, or fp16 before Ampere; off on a CPU"),
    "grad-checkpointing": (bool, False, "save memory: recompute layers in the backward pass"),
    "workers": (int, (1, 8), "processes that load data"),
    "seed": (int, 0, "decides weights, crops, sentences, and the order of samples"),
    "out": (str, None, "the run's folder (default: runs/DATA-CAL[-betaB]-seedS)"),
    "save-every": (int, 500, "steps between checkpoints; there is one after each epoch, too"),
    "eval-every": (float, 1.0, "epochs between evaluations"),
}
TOWERS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}
MAY_BE_ZERO = {"beta", "cal_weight", "sentences", "phrases", "lr", "lr_pooler", "warmup", "wd",
               "workers", "seed"}
MAY_CHANGE_ON_RESUME = {"command", "out", "root", "val", "workers", "save_every", "eval_every",
                        "grad_checkpointing"}
CODE_FILES = ("train.py", "model.py", "loss.py", "data.py", "eval.py")
LOG_EVERY = 10  # steps
MAX_BAD_STEPS = {"off": 3, "bf16": 3, "fp16": 20}  # in a row; fp16 needs some to find its scale
LOADER_TIMEOUT = 300  # seconds that a step waits for a batch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by FLAGS. Raises InputError for a value out of range."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (kind, default, text) in FLAGS.items():
        if isinstance(default, tuple):
            text += f" (default: {default[0]} on scenes, else {default[1]})"
        elif default is not None and kind is not bool:
            text += f" (default: {default})"
        options = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if kind is bool:
            options = {"action": "store_true"}
        parser.add_argument(f"--{name}", default=default, help=text, **options)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, tuple):
            value = value[0] if args.data == "scenes" else value[1]
            setattr(args, name, value)
        highest = 1 if name == "beta" else 2**63 - 1  # of an int64; not inf
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not (0 < value <= highest or (value == 0 and name in MAY_BE_ZERO)):
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range")
    args.command = shlex.join(sys.argv[1:] if argv is None else argv)
    if args.amp is None:
        has_bf16 = models.GPU_CAPABILITY >= (8, 0)
        args.amp = "bf16" if has_bf16 else "fp16" if torch.cuda.is_available() else "off"
    cal = "none" if args.cal == "none" else f"{args.cal}-beta{args.beta:g}"
    args.out = args.out or f"runs/{Path(args.data).stem}-{cal}-seed{args.seed}"
    return args


# ---- the step ------------------------------------------------------------------------------------
def train_step(ddp_model: nn.Module, batches: Iterator[data.Batch],
               optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               args: argparse.Namespace) -> tuple[Tensor, Tensor, bool]:
    """One optimiser step on the next args.accum batches. Returns L_clip and β-CAL of each, [accum,
    2], the gradient's norm, and whether it is finite; if it is not, no weight was changed."""
    model = ddp_model.module if isinstance(ddp_model, DDP) else ddp_model
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
    losses = []
    for micro_step in range(args.accum):
        batch = next(batches)
        # DDP exchanges gradients in the last micro-step only (a plain model ignores this)
        ddp_model.require_backward_grad_sync = micro_step == args.accum - 1
        with torch.autocast(batch.pixels.device.type, dtype, enabled=args.amp != "off"):
            cls, text, pooled = ddp_model(batch.pixels, batch.texts, batch.image_of_query)
        l_clip = clip_loss(cls, text[batch.caption_index], model.clip.logit_scale.exp())
        l_cal = torch.zeros_like(l_clip)
        if args.cal != "none":
            l_cal = beta_cal(pooled, text, batch.image_of_query, model.pooler.logit_scale.exp(),
                             args.beta, args.cal, args.global_negatives)
        loss = l_clip + args.cal_weight * l_cal
        scaler.scale(loss / args.accum).backward()
        losses.append(torch.stack([l_clip, l_cal]).detach())

    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    is_finite = bool(norm.isfinite())  # here, once a step, the host waits for the GPU
    if is_finite:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    for logit_scale in (model.clip.logit_scale, model.pooler.logit_scale):
        logit_scale.data.clamp_(0, math.log(100))
    return torch.stack(losses), norm, is_finite


def cosine(step: float, total: float, peak: float, final: float, warmup: int = 0,
           start: float = 0.0) -> float:
    """The learning rate: linear from `start` (step 0) to `peak` (warmup - 1), cosine to `final`."""
    if step < warmup:
        return start + (peak - start) * min(1, step / max(1, warmup - 1))
    return final + (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def parameter_groups(model: BetaCLIP, weight_decay: float) -> list[dict]:
    """AdamW's groups of trained parameters: the backbone, which is the CLIP, and the rest, at the
    pooler's learning rate; in each, first the matrices, which are decayed, and then all others."""
    groups = [{"part": part, "params": [], "weight_decay": decay}
              for part in ("backbone", "pooler") for decay in (weight_decay, 0.0)]
    for name, param in model.named_parameters():
        if param.requires_grad:
            number = (0 if name in model.stock_names else 2) + (0 if param.ndim >= 2 else 1)
            groups[number]["params"].append(param)
    return groups


def device_batches(loader: DataLoader, device: torch.device) -> Iterator[data.Batch]:
    """Yield the loader's batches, on the device. Raises InputError if the loader hangs, or if over
    ten images, and over 1 % of those drawn, could not be read."""
    iterator = iter(loader)
    drawn = 0
    errors = []
    while True:
        try:
            batch = next(iterator, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            for worker in multiprocessing.active_children():
                worker.kill()  # or the exit waits for it
            raise InputError(f"{error}: the disk is slow, or /dev/shm is full (docker run "
                             "--shm-size=8g): try fewer --workers") from error
        if batch is None:
            return
        drawn += len(batch.pixels)
        for message in sorted(set(batch.read_errors) - set(errors)):
            tqdm.write(f"unreadable image, replaced: {message}", file=sys.stderr)
        errors += batch.read_errors
        if len(errors) > max(10, 0.01 * drawn):
            raise InputError(f"{len(errors)} of {drawn} draws hit {len(set(errors))} broken images")
        yield batch.to(device)


# ---- the run's folder ----------------------------------------------------------------------------
@dataclass
class Progress:
    """How far a run is, in images, so that the number of processes may change."""

    total: int  # images in the whole run
    seen: int = 0  # images so far
    step: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    bad_steps: int = 0  # of these, in a row so far
    eval_due: bool = True  # before the next step

    def crossed(self, interval: float, per_step: int) -> bool:
        """Whether the last step passed a multiple of `interval` images."""
        return self.seen // interval > (self.seen - per_step) // interval


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a temporary file, flush it, rename it: a whole checkpoint always exists."""
    temporary = path.with_suffix(".tmp")
    with input_errors(f"{path} cannot be written, and stays as it was"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def log(args: argparse.Namespace, **values: float | dict) -> None:
    """Append a line to log.jsonl. A resumed run may log a step again: its last line counts."""
    if rank() != 0:
        return
    line = {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()}
    with (input_errors(f"{args.out}/log.jsonl cannot be written"),
          open(Path(args.out, "log.jsonl"), "a", encoding="utf-8") as file):
        file.write(json.dumps(line) + "\n")


def say(text: str) -> None:
    """Print a line about the run, in one process."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


received_signals: list[tuple[int, float]] = []  # number, time


def on_signal(signum: int, frame: object) -> None:
    """At the first SIGTERM or SIGINT let the step end; at another, over a second later, end the
    process. (torchrun sends each signal to a process again immediately.)"""
    if received_signals and time.monotonic() > received_signals[0][1] + 1:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    received_signals.append((signum, time.monotonic()))


def handle_signals(handler: object, worker: int | None = None) -> None:
    """Set what SIGTERM and SIGINT do; also used as a loader's worker_init_fn."""
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


# ---- main ----------------------------------------------------------------------------------------
def build(args: argparse.Namespace) -> tuple[BetaCLIP, CLIPTokenizer, data.Captions | data.Scenes]:
    """The model that a run starts from, its tokenizer, and the training data. Raises InputError."""
    if args.model == "scratch":
        tokenizer = data.build_scenes_tokenizer()
        model = models.build_small_model(tokenizer, data.PICTURE_PIXELS)
    else:
        model, tokenizer = models.load(args.model)
    pooler = "none" if args.cal == "none" else "continued" if model.use_pooler else "new"
    say(f"model: {args.model}; pooler: {pooler}; new parameters: {model.missing_names or 'none'}")
    model.use_pooler = args.cal != "none"
    model.pooler.requires_grad_(model.use_pooler)
    for name in TOWERS[args.freeze] if args.freeze else ():
        model.clip.get_submodule(name).requires_grad_(False)
    if args.grad_checkpointing:
        model.run_layer = partial(checkpoint, model.run_layer, use_reentrant=False)

    limits = (args.sentences, args.phrases if model.use_pooler else 0)
    if args.data == "scenes":
        samples = data.Scenes(model.image_size, limits, args.seed)
    else:
        lists = [Path(args.root, name) for name in data.SHAREGPT4V_LISTS]
        found = next((path for path in lists if path.is_file()), lists[-1])
        samples = data.Captions(found if args.data == "sharegpt4v" else args.data, args.root,
                                model.image_size, limits, args.seed, args.columns)
    say(f"data: {samples.summary}")
    if len(samples) < args.batch_size * world_size():
        raise InputError(f"the data has {len(samples)} rows, too few for a batch of --batch-size "
                         f"{args.batch_size} x {world_size()} processes")
    return model, tokenizer, samples


def load_tasks(args: argparse.Namespace, trained_split: str) -> list[evaluation.Task]:
    """What a run is evaluated on: the scenes, or else the benchmarks under --root; and --val."""
    names = evaluation.BUILT_IN if args.data == "scenes" else evaluation.find_benchmarks(args.root)
    tasks = []
    for name in names:
        try:
            tasks.append(evaluation.load_benchmark(name, args.root))
        except InputError as error:
            say(f"evaluation: left out: {error}")
    if args.val and args.val not in names:
        tasks.append(evaluation.load_benchmark(args.val, args.root, args.columns))
        is_same = os.path.realpath(args.val) == os.path.realpath(args.data)
        is_same |= args.data == "sharegpt4v" and data.SHAREGPT4V in args.val
        if is_same and tasks[-1].source == trained_split:
            raise InputError(f"--val {args.val}: these are the training rows")
    say(f"evaluation: {', '.join(task.name for task in tasks) or 'none, add --val'}")
    return tasks


def resume(path: Path, args: argparse.Namespace, stateful: dict, meta: dict) -> Progress:
    """Load the checkpoint, if there is one, into `stateful`. Raises InputError if its run has other
    arguments (a flag that it lacks counts as having its default) or other data."""
    per_step = args.batch_size * world_size() * args.accum
    if not path.is_file():
        steps = max(1, int(args.epochs * meta["data"]["rows"] / per_step))
        steps = min(steps, args.max_steps or steps)
        say(f"run: {args.out}, {steps} steps of {per_step} images")
        return Progress(total=steps * per_step)
    saved = models.read_checkpoint(path, "args")
    before = vars(parse_args(["--data", args.data])) | saved["args"]
    changes = [f"--{name.replace('_', '-')} {before.get(name)} (now {value})" for name, value in
               vars(args).items() if name not in MAY_CHANGE_ON_RESUME and before.get(name) != value]
    if saved.get("data", meta["data"]) != meta["data"]:
        changes.append(f"other data, of {saved['data']['rows']} rows (now {meta['data']['rows']})")
    if changes:
        raise InputError(f"{path} is from a run with {', '.join(changes)}: use another --out")
    for name, owner in stateful.items():
        with input_errors(f"{path} does not fit the model"):
            owner.load_state_dict(saved[name])
    progress = Progress(**{name: saved[name] for name in Progress.__annotations__ if name in saved})
    steps = progress.step + math.ceil((progress.total - progress.seen) / per_step)
    say(f"run: resuming {args.out} at step {progress.step} of {steps}, of {per_step} images each, "
        f"processes: {world_size()} (before: {saved['world']})")
    if progress.seen >= progress.total:
        say(f"run: it is finished; to train again, delete {args.out}, or give another --out")
    edited = [name for name in CODE_FILES if saved.get("code", {}).get(name) != meta["code"][name]]
    if edited:
        say(f"run: {', '.join(edited)} changed since it was saved")
    return progress


def make_loader(args: argparse.Namespace, samples: data.Captions | data.Scenes,
                tokenizer: CLIPTokenizer, seen: int, left: int) -> DataLoader:
    """Make a loader of this process's batches: of the `left` images after the first `seen` ones."""
    batches = data.sample_order(len(samples), args.batch_size, seen, seen + left, rank(),
                                world_size(), args.seed)
    # a forked worker ends with its parent process, unlike a forkserver's
    context = "fork" if args.workers and sys.platform == "linux" else None
    return DataLoader(
        samples, batch_sampler=batches,
        collate_fn=partial(data.collate, tokenizer=tokenizer, captions_only=args.cal == "none"),
        num_workers=args.workers, multiprocessing_context=context,
        pin_memory=torch.cuda.is_available(), timeout=LOADER_TIMEOUT if args.workers else 0,
        worker_init_fn=partial(handle_signals, signal.SIG_IGN))  # the last step needs its workers


def evaluate_and_export(model: BetaCLIP, tokenizer: CLIPTokenizer, tasks: list[evaluation.Task],
                        args: argparse.Namespace, progress: Progress, epoch_size: int) -> None:
    """Evaluate the model, log the scores, write hf/, and at the end of the run print a table and
    write eval.json; in one process, while the others wait."""
    if rank() == 0:
        results = {task.name: evaluation.evaluate(model, tokenizer, task) for task in tasks}
        log(args, step=progress.step, epoch=progress.seen / epoch_size, eval=results)
        table = "\n".join(evaluation.format_table(task, {args.out: results[task.name]})
                          for task in tasks)
        models.export(model, tokenizer, Path(args.out, "hf"), base=args.model, results=table,
                      command=f"python train.py {args.command}")
        if progress.seen >= progress.total:
            with input_errors(f"{args.out}/eval.json cannot be written"):
                Path(args.out, "eval.json").write_text(json.dumps(results), encoding="utf-8")
            tqdm.write(table)
    barrier()
    model.train()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = join_processes()
    say(f"arguments: {json.dumps(vars(args))}")
    torch.manual_seed(args.seed)  # the same weights in each process
    model, tokenizer, samples = build(args)
    model.to(device).train()
    tasks = load_tasks(args, samples.split) if rank() == 0 else []
    groups = parameter_groups(model, args.wd)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    stateful = {"model": model, "optimizer": optimizer, "scaler": scaler}
    code = {name: hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest()
            for name in CODE_FILES}
    meta = {"args": vars(args), "world": world_size(), "code": code,
            "data": {"rows": len(samples), "fingerprint": samples.fingerprint}}
    path = Path(args.out, "checkpoint.pt")
    progress = resume(path, args, stateful, meta)

    def save() -> None:
        if rank() == 0:
            states = {name: owner.state_dict() for name, owner in stateful.items()}
            save_checkpoint(path, states | meta | asdict(progress))

    if not path.is_file():  # makes the folder, or fails; a late rank may load it: the same state
        save()
    per_step = args.batch_size * world_size() * args.accum
    epoch_size = len(samples)
    steps_left = math.ceil((progress.total - progress.seen) / per_step)
    loader = make_loader(args, samples, tokenizer, progress.seen, steps_left * per_step)
    ddp_model = model
    if world_size() > 1:
        ddp_model = DDP(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    total_steps = progress.total / per_step
    warmup = min(int(args.warmup * epoch_size / per_step), int(total_steps / 10))
    bar = tqdm(total=progress.step + steps_left, initial=progress.step, disable=rank() > 0)
    # closing the batches ends the loader's workers
    with bar, contextlib.closing(device_batches(loader, device)) as batches:
        while True:
            if progress.eval_due:  # this may be interrupted: a resumed run does it again
                handle_signals(signal.SIG_DFL)
                evaluate_and_export(model, tokenizer, tasks, args, progress, epoch_size)
                bar.unpause()  # images_per_s is of training, without the evaluation
            if progress.seen >= progress.total:
                break
            handle_signals(on_signal)

            at_step = progress.seen / per_step
            lr = cosine(at_step, total_steps, args.lr, 1e-2 * args.lr, warmup, start=1e-4 * args.lr)
            lr_pooler = cosine(at_step, total_steps, args.lr_pooler, 0.1 * args.lr_pooler)
            for group in optimizer.param_groups:
                group["lr"] = lr if group["part"] == "backbone" else lr_pooler
            losses, norm, is_finite = train_step(ddp_model, batches, optimizer, scaler, args)
            progress.step += 1
            progress.seen += per_step
            progress.skipped += not is_finite
            progress.bad_steps = 0 if is_finite else progress.bad_steps + 1
            bar.update()

            stop_signal = torch.tensor(received_signals[0][0] if received_signals else 0)
            if world_size() > 1:  # a signal may reach only one process
                dist.all_reduce(stop_signal, dist.ReduceOp.MAX)
            is_last = progress.seen >= progress.total
            never_finite = is_last and progress.skipped == progress.step  # in a short run
            is_hopeless = never_finite or progress.bad_steps >= MAX_BAD_STEPS[args.amp]
            if progress.step % LOG_EVERY == 0 or is_last or is_hopeless:
                losses = losses.mean(dim=0) / world_size()
                if world_size() > 1:
                    dist.all_reduce(losses)
                l_clip, l_cal = losses.tolist()
                if is_hopeless:
                    raise InputError(f"step {progress.step}: {progress.bad_steps} gradients were "
                                     f"not finite (L_clip {l_clip:g}, β-CAL {l_cal:g}): lower --lr")
                speed = per_step * (bar.format_dict["rate"] or 0)
                bar.set_postfix_str(f"L_clip {l_clip:.3f} β-CAL {l_cal:.3f} {speed:.0f} img/s")
                log(args, step=progress.step, epoch=progress.seen / epoch_size, l_clip=l_clip,
                    l_cal=l_cal, loss=l_clip + args.cal_weight * l_cal, lr=lr, lr_pooler=lr_pooler,
                    scale=model.clip.logit_scale.exp().item(), grad_norm=norm.item(),
                    pooler_scale=model.pooler.logit_scale.exp().item(), skipped=progress.skipped,
                    images_per_s=speed, peak_gib=torch.cuda.max_memory_allocated() / 2**30)

            progress.eval_due = is_last or progress.crossed(args.eval_every * epoch_size, per_step)
            to_save = progress.step % args.save_every == 0 or progress.crossed(epoch_size, per_step)
            if to_save or progress.eval_due or stop_signal:
                save()
            if stop_signal:
                name = signal.Signals(stop_signal.item()).name
                say(f"{name}: stopped after step {progress.step}; the same command resumes")
                raise SystemExit(128 + stop_signal.item())


if __name__ == "__main__":
    with command_line():
        main()
    if dist.is_initialized():
        dist.destroy_process_group()
