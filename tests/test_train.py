"""The step against the authors' training, and whole runs: settings, and what is trained."""

import io
import itertools
import json
import shutil
import sys

import kill
import pytest
import torch
from torch import nn

import data
import eval as evaluation
import model as models
import train

ENCODER = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
           "num_attention_heads": 2}
TRAJECTORY = {  # the model of golden/trajectory.pt
    "projection_dim": 16,
    "vision_config": ENCODER | {"image_size": 32, "patch_size": 16},
    "text_config": ENCODER | {"vocab_size": 120},
}


@pytest.fixture(autouse=True)
def each_step_is_logged(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "handle_signals", lambda *_: None)  # pytest keeps its own


def run(out, flags="", model="scratch"):
    """Train, two steps if the flags do not say otherwise. Returns the steps' lines of the log."""
    default = "--max-steps 2 --batch-size 8 --workers 0"
    train.main(f"{default} --model {model} --out {out} {flags}".split())
    return [line for (kind, _), line in kill.read_log(out).items() if kind == "step"]


def changed_parts(model, other, depth):
    """The parts of a model whose weights differ from another's, such as "clip.logit_scale"."""
    theirs = other.state_dict()
    names = [name for name, weight in model.state_dict().items()
             if not torch.equal(weight, theirs[name])]
    return {".".join(name.split(".")[:depth]) for name in names}


# ---- the step ------------------------------------------------------------------------------------
def test_schedule_golden(golden):
    schedule = json.loads((golden / "schedule.json").read_text())
    backbone = [train.cosine(step, 500, 1e-5, 1e-7, 25, 1e-9) for step in range(500)]
    pooler = [train.cosine(step, 500, 1e-3, 1e-4) for step in range(500)]
    assert backbone == pytest.approx(schedule["backbone"], rel=1e-9)
    assert pooler == pytest.approx(schedule["pooler"], rel=1e-9)


def test_parameter_groups_hold_each_parameter_once_and_decay_matrices_only(tiny_model):
    tiny_model.shift = nn.Parameter(torch.zeros(128))  # as if someone had edited the model
    groups = train.parameter_groups(tiny_model, 0.01)
    names = {param: name for name, param in tiny_model.named_parameters()}
    grouped = []
    for group in groups:
        for param in group["params"]:
            assert (param.ndim >= 2) == (group["weight_decay"] > 0)
            assert names[param].startswith("clip.") == (group["part"] == "backbone")
            grouped.append(names[param])
    assert sorted(grouped) == sorted(names.values())


def make_batch(batch):
    """A batch of the golden file: each image has a caption, two sentences and three phrases."""
    texts = []
    for of_image in zip(batch["text"], batch["phrases"], strict=True):
        for row in itertools.chain(*of_image):
            texts.append(row[row != 0].tolist())
    return data.Batch(
        pixels=batch["pixels"],
        texts=models.pack(texts),
        image_of_query=torch.arange(3).repeat_interleave(6),
        level=torch.tensor([0, 1, 1, 2, 2, 2]).repeat(3),
        caption_index=torch.tensor([0, 6, 12]),
        read_errors=[])


@pytest.mark.parametrize("number", [0, 1], ids=["ce", "bce"])
def test_six_steps_meet_the_authors(golden, monkeypatch, number):
    monkeypatch.setitem(models.AUTHORS_CONFIGS, 32, TRAJECTORY)
    case = torch.load(golden / "trajectory.pt", weights_only=True)[number]
    flags = f"--cal {case['kind']} --beta {case['beta']} --accum {case['accum']}"
    args = train.parse_args(flags.split())
    model = models.from_authors(case["start"])
    groups = train.parameter_groups(model, case["wd"])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = (make_batch(batch) for batch in case["batches"])
    losses = []
    for lr, lr_pooler in zip(case["lrs"], case["lrs_pooler"], strict=True):
        for group in groups:
            group["lr"] = lr if group["part"] == "backbone" else lr_pooler
        of_step, _, _ = train.train_step(model, batches, optimizer, scaler, args)
        losses += of_step.tolist()
    assert losses == [pytest.approx(theirs, abs=2e-5) for theirs in case["losses"]]


@pytest.fixture
def same_batch(tokenizer):
    """An endless iterator of the same four scenes."""
    scenes = data.Scenes(data.PICTURE_PIXELS, limits=(5, 8))
    return itertools.repeat(data.collate([scenes[0, index] for index in range(4)], tokenizer))


def test_accumulation_takes_the_mean(tiny_model, same_batch):
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    norms = []
    for accum in ("1", "3"):
        args = train.parse_args(["--accum", accum])
        _, norm, _ = train.train_step(tiny_model, same_batch, optimizer, scaler, args)
        norms.append(norm.item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_finite_gradient_whose_norm_overflows_changes_nothing(
        tiny_model, same_batch, with_scaler):
    args = train.parse_args([])
    optimizer = torch.optim.AdamW(train.parameter_groups(tiny_model, 0.01), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=with_scaler)
    weight = tiny_model.pooler.attn.in_proj_weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, 1e38))
    before = [param.clone() for param in tiny_model.parameters()]
    _, norm, is_finite = train.train_step(tiny_model, same_batch, optimizer, scaler, args)
    assert norm == torch.inf and not is_finite
    torch.testing.assert_close(list(tiny_model.parameters()), before, atol=0, rtol=0)


# ---- whole runs ----------------------------------------------------------------------------------
def test_forty_steps_lower_the_loss_and_eval_prints_the_table_of_training(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(data.NUM_SCENES, "test", 40)
    flags = "--max-steps 40 --sentences 2 --phrases 2"
    losses = [line["loss"] for line in run(tmp_path, flags)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    table = capsys.readouterr().out
    assert len(table.splitlines()) > 10
    card = (tmp_path / "hf/README.md").read_text()
    assert f"{flags}`\n" in card and table in card
    evaluation.main(["--ckpt", str(tmp_path), "--json", str(tmp_path / "scores.json")])
    assert capsys.readouterr().out == table
    records = json.loads((tmp_path / "scores.json").read_text())
    results = json.loads((tmp_path / "eval.json").read_text())
    assert {record["metric"]: record["score"] for record in records} == results["scenes"]
    last_line = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last_line)["eval"] == results


@pytest.mark.parametrize("flags", [
    "--cal none", "--cal bce --amp bf16 --accum 2", "--amp fp16 --max-steps 6",
    "--phrases 0 --grad-checkpointing", "--sentences 0"])
def test_other_settings_train(tmp_path, clip_folder, fast_scenes, flags):
    lines = run(tmp_path, flags, clip_folder)
    assert all(0 < line["loss"] < 20 for line in lines)
    for source in (tmp_path, tmp_path / "hf"):
        model, _ = models.load(source)
        assert model.use_pooler == ("none" not in flags)
        assert model.image_size == 64


# ---- what is trained, and how fast ---------------------------------------------------------------
@pytest.mark.parametrize("pooler", ["new", "continued"])
def test_a_trained_pooler_is_continued_and_lr_0_trains_it_alone(
        tmp_path, clip_folder, fast_scenes, capsys, pooler):
    left_out = shutil.ignore_patterns("pooler*" if pooler == "new" else "")
    start = shutil.copytree(clip_folder, tmp_path / "clip", ignore=left_out)
    before, _ = models.load(start)
    for lr_pooler in (0, 0.1):
        out = tmp_path / f"out-{lr_pooler}"
        run(out, f"--lr 0 --lr-pooler {lr_pooler}", start)
        assert f"model: {start}; pooler: {pooler};" in capsys.readouterr().err
        after, _ = models.load(out)
        is_changed = pooler == "new" or lr_pooler > 0
        assert changed_parts(after, before, 1) == ({"pooler"} if is_changed else set())


@pytest.mark.parametrize("flag, frozen", [
    ("text", {"clip.text_model", "clip.text_projection"}),
    ("image", {"clip.vision_model", "clip.visual_projection"})])
def test_a_frozen_encoder_keeps_its_weights(tmp_path, clip_folder, fast_scenes, flag, frozen):
    run(tmp_path, f"--freeze {flag}", clip_folder)
    before, _ = models.load(clip_folder)
    after, _ = models.load(tmp_path)
    names = [".".join(name.split(".")[:2]) for name, _ in before.named_parameters()]
    assert changed_parts(after, before, 2) == set(names) - frozen
    optimizer = models.read_checkpoint(tmp_path / "checkpoint.pt", "optimizer")["optimizer"]
    assert len(optimizer["state"]) == sum(name not in frozen for name in names)


def test_the_warm_up_is_at_most_a_tenth_of_the_steps(tmp_path, fast_scenes):
    flags = "--max-steps 20 --batch-size 4 --phrases 0 --sentences 0"
    lrs = [line["lr"] for line in run(tmp_path, flags)]
    assert lrs[:3] == pytest.approx([1e-7, 1e-3, 1e-3])
    assert lrs == [lrs[0], *sorted(lrs[1:], reverse=True)]
    assert 1e-5 < lrs[-1] < 2e-5


@pytest.mark.parametrize("has_gpu, capability, amp", [
    (True, (8, 0), "bf16"), (True, (7, 5), "fp16"), (False, (0, 0), "off")])
def test_the_default_precision_is_that_of_the_gpu(monkeypatch, has_gpu, capability, amp):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(models, "GPU_CAPABILITY", capability)
    assert train.parse_args([]).amp == amp
    assert train.parse_args(["--amp", "off"]).amp == "off"


def test_help_is_printed_on_a_console_that_does_not_know_greek(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit), models.command_line():
        train.main(["--help"])
    console.flush()
    assert "weight of ?-CAL" in console.buffer.getvalue().decode("cp1252")
