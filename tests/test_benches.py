"""The benchmarks on small stand-ins in each real format (SPEC §7), against stock transformers and one box at a time."""

import json
import random
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import roi_align
from transformers import CLIPModel, CLIPProcessor

import data
import eval as evaluation
import model as models

ROOT = Path(data.__file__).parent
SHARED = ROOT.parent / "shared" / "data"
NAMES = ["sa_1.jpg", "a b.jpg", "ü.jpg"] + [f"{i}.jpg" for i in range(6)]  # nine: no multiple of two ranks


def words(rng, count):
    return " ".join(rng.choice([*data.COLOURS, *data.SHAPES]) for _ in range(count)).capitalize()


def images(folder, names=NAMES, seed=0, sizes=None):
    """JPEGs of coloured noise, of all aspects; with even margins to crop, of which transformers cuts what torchvision cuts."""
    rng = random.Random(seed)
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        times, margin = rng.randint(1, 3), rng.randint(0, 40)
        size = sizes[number] if sizes else rng.sample((64 * times, 64 * times + 2 * times * margin), 2)
        noise = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
        noise.resize(size, Image.Resampling.BICUBIC).save(path)


def write(path, whole):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(whole if isinstance(whole, str) else json.dumps(whole), encoding="utf-8")


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def fgovd_rows(rng):
    """Rows of all splits, 2 to 10 negatives each, several boxes an image."""
    return {level: [{"img_path": f"val2017/{rng.choice(NAMES)}", "bbox": [rng.uniform(0, 15), rng.uniform(0, 15), rng.uniform(3, 25), rng.uniform(3, 25)],
                     "pos_expression": [words(rng, 4)], "neg_expression": [words(rng, 4) for _ in range(rng.randint(2, 10))]} for _ in range(30)]
            for level in evaluation.LEVELS}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    images(root / "Urban1k/image", [f"{i}.jpg" for i in range(1, 12)], 1)
    for i in range(1, 12):
        write(root / f"Urban1k/caption/{i}.txt", f"{words(rng, 60)}.\nA second line that is not the caption\n")
    images(root / "sam/images", NAMES, 2)
    write(root / data.SHAREGPT4V, [{"id": str(i), "image": f"sam/images/{name}", "conversations": [
        {"from": "human", "value": "What is it?"}, {"from": "gpt", "value": f"{words(rng, 30)}.\n{words(rng, 9)} red red."}]} for i, name in enumerate(NAMES)])
    home = root / "densely_captioned_images"
    images(home / "photos", NAMES, 3)
    for i, name in enumerate(NAMES):
        write(home / f"annotations/{i}.json", {"image": name, "short_caption": words(rng, 5), "extra_caption": words(rng, 40)})
    write(home / "splits.json", {"train": [f"{i}.json" for i in range(5)], "test": [f"{i}.json" for i in range(5, len(NAMES))]})
    images(root / "val2017", NAMES, 4)
    write(root / "captions_val2017.json", {"images": [{"id": i, "file_name": name} for i, name in enumerate(NAMES)],
                                           "annotations": [{"image_id": i, "caption": words(rng, 8)} for i in range(len(NAMES)) for _ in range(5 + i % 2)]})
    images(root / "flickr30k/flickr30k-images", NAMES, 5)
    write(root / "flickr30k/dataset_flickr30k.json", {"images": [
        {"filename": name, "split": "test" if i else "train", "sentences": [{"raw": words(rng, 8)} for _ in range(5)]} for i, name in enumerate(NAMES)]})
    for level, rows in fgovd_rows(rng).items():
        write(root / evaluation.FGOVD[level][0], lines(rows))
    images(root / "food-101/images", [f"{food}/{i}.jpg" for food in ("apple_pie", "red_soup", "waffles") for i in range(3)], 6)
    foods = {food: [f"{food}/{i}" for i in range(3)] for food in ("apple_pie", "red_soup", "waffles")}
    write(root / "food-101/meta/test.json", foods)
    return root


def run(capsys, *argv):
    evaluation.main([str(part) for part in argv])
    return capsys.readouterr().out


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(part) for part in argv])
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert stop.value.code == 2
    return error


def stock_recall(clip, pairs):
    """R@1 with transformers alone: one image and one text at a time, by its own processor."""
    stock, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    with torch.inference_mode():
        cls = torch.stack([stock.get_image_features(**processor(images=Image.open(path).convert("RGB"), return_tensors="pt")).pooler_output[0] for path, _ in pairs])
        scores = [[(i, F.cosine_similarity(stock.get_text_features(**processor(text=text, return_tensors="pt", truncation=True)).pooler_output, cls))
                   for text in texts] for i, (_, texts) in enumerate(pairs)]
    flat = [one for image in scores for one in image]
    t2i = sum(int(similarity.argmax()) == i for i, similarity in flat) / len(flat)
    best = [max(flat, key=lambda one: one[1][i])[0] for i in range(len(pairs))]
    return 100 * t2i, 100 * sum(i == j for i, j in enumerate(best)) / len(pairs)


def expected_pairs(root):
    sharegpt = json.loads((root / data.SHAREGPT4V).read_text())
    karpathy = json.loads((root / "flickr30k/dataset_flickr30k.json").read_text())["images"][1:]
    coco = json.loads((root / "captions_val2017.json").read_text())
    home = root / "densely_captioned_images"
    dci = [json.loads((home / f"annotations/{i}.json").read_text()) for i in range(len(NAMES))]
    return {
        "urban1k": [(root / f"Urban1k/image/{i}.jpg", [(root / f"Urban1k/caption/{i}.txt").read_text().split("\n")[0]]) for i in range(1, 12)],
        "sv1k": [(root / row["image"], [data.clean(row["conversations"][1]["value"])]) for row in sharegpt],
        "dci": [(home / "photos" / row["image"], [row["extra_caption"]]) for row in dci],
        "dci --dci-caption short+extra": [(home / "photos" / row["image"], [row["short_caption"] + "\n" + row["extra_caption"]]) for row in dci],
        "coco": [(root / "val2017" / name, [row["caption"] for row in coco["annotations"] if row["image_id"] == i]) for i, name in enumerate(NAMES)],
        "flickr30k": [(root / "flickr30k/flickr30k-images" / row["filename"], [text["raw"] for text in row["sentences"]]) for row in karpathy],
    }


@pytest.mark.parametrize("flags", ["urban1k", "sv1k", "dci", "dci --dci-caption short+extra", "coco", "flickr30k"])
def test_retrieval_equals_stock_transformers(root, clip, tmp_path, capsys, flags):
    run(capsys, "--bench", *flags.split(), "--root", root, "--ckpt", clip, "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())[flags.split()[0]]
    assert (scores["T2I R@1"], scores["I2T R@1"]) == pytest.approx(stock_recall(clip, expected_pairs(root)[flags]))


def one_box_at_a_time(clip, root, rows):
    model, tokenizer, good = models.load(clip), models.load_tokenizer(clip), 0
    for row in rows:
        image = Image.open(root / row["img_path"]).convert("RGB")
        x, y, w, h = row["bbox"]
        with torch.inference_mode():
            pixels = data.to_pixels(image.resize((64, 64)), 64)
            grid = model.encode_image(pixels[None])[1].transpose(1, 2).reshape(1, -1, 8, 8)
            roi = torch.tensor([[0, x * 8 / image.width, y * 8 / image.height, (x + w) * 8 / image.width, (y + h) * 8 / image.height]])
            region = roi_align(grid, roi, 1, sampling_ratio=-1, aligned=True).flatten()
            texts = model.encode_text(data.tokenize(tokenizer, row["pos_expression"] + row["neg_expression"]))
        scores = F.cosine_similarity(region[None], texts)
        good += bool(scores[0] >= scores[1:].max())
    return 100 * good / len(rows)


def test_fgovd_equals_one_box_at_a_time_in_both_formats(root, clip, tmp_path, capsys):
    rows = fgovd_rows(random.Random(7))
    for number, level in enumerate(rows):
        write(tmp_path / "lines" / evaluation.FGOVD[level][0], lines(rows[level]))
        write(tmp_path / "coco" / evaluation.FGOVD[level][1], {
            "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(NAMES)],
            "annotations": [{"image_id": 10 + NAMES.index(row["img_path"][8:]), "bbox": row["bbox"], "pos_expression": row["pos_expression"][0],
                             "neg_expression": row["neg_expression"]} for row in rows[level]]})
    for form in ("lines", "coco"):
        shutil.copytree(root / "val2017", tmp_path / form / "val2017")
        run(capsys, "--bench", "fgovd", "--root", tmp_path / form, "--ckpt", clip, "--json", tmp_path / "s.json")
        scores = json.loads((tmp_path / "s.json").read_text())["fgovd"]
        assert scores == pytest.approx({level: one_box_at_a_time(clip, root, rows[level]) for level in rows})


@pytest.mark.parametrize("bench, files", [("coco", ["captions_val2017.json"]), ("fgovd", [names[0] for names in evaluation.FGOVD.values()])])
def test_a_set_may_lie_in_a_folder_of_its_own(root, clip, tmp_path, capsys, bench, files):
    shutil.copytree(root / "val2017", tmp_path / bench / "val2017")
    for name in files:
        shutil.copy(root / name, tmp_path / bench)
    apart, together = (run(capsys, "--bench", bench, "--root", at, "--ckpt", clip) for at in (tmp_path, root))
    assert apart == together


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_real_rows(clip, tmp_path, capsys):
    sizes = {}
    for file in (SHARED / "fgovd").iterdir():
        shutil.copy(file, tmp_path)
        for _, row in data.rows(file):
            sizes[row["img_path"]] = (row["width"], row["height"])
    images(tmp_path, list(sizes), sizes=list(sizes.values()))
    rows = json.loads((SHARED / "urban1k_captions.json").read_text())
    images(tmp_path / "Urban1k/image", [row["image"] for row in rows])
    for row in rows:
        write(tmp_path / "Urban1k/caption" / row["image"].replace(".jpg", ".txt"), row["caption"] + "\n")
    printed = run(capsys, "--bench", "fgovd", "urban1k", "--root", tmp_path, "--ckpt", clip, "--json", tmp_path / "s.json")
    assert "ce 30.9, bce 20.1" in printed and "ce 89.0, bce 91.8" in printed  # the published figures beside ours
    scores = json.loads((tmp_path / "s.json").read_text())
    hard = [row for _, row in data.rows(tmp_path / "h_attributes_llava.jsonl")]
    assert scores["fgovd"]["hard"] == pytest.approx(one_box_at_a_time(clip, tmp_path, hard))
    assert scores["urban1k"]["T2I R@1"] == pytest.approx(stock_recall(clip, [
        (tmp_path / "Urban1k/image" / row["image"], [row["caption"].translate(data.QUOTES)]) for row in rows])[0])


def test_pooled_score_pools_every_image_by_every_text(root, clip, tmp_path, capsys):
    pairs, model, tokenizer = expected_pairs(root)["urban1k"], models.load(clip), models.load_tokenizer(clip)
    run(capsys, "--bench", "urban1k", "--score", "pooled", "--root", root, "--ckpt", clip, "--json", tmp_path / "s.json")
    scores = torch.zeros(len(pairs), len(pairs))
    with torch.inference_mode():
        for i, (path, _) in enumerate(pairs):
            patches = model.encode_image(data.to_pixels(Image.open(path), 64)[None])[1]
            for j, (_, (text,)) in enumerate(pairs):
                t = model.encode_text(data.tokenize(tokenizer, [text]))
                scores[j, i] = F.cosine_similarity(model.pooler(t, torch.tensor([0]), patches), t)
    expected = evaluation.recall(scores, torch.arange(len(pairs)))
    assert json.loads((tmp_path / "s.json").read_text())["urban1k"] == pytest.approx(expected)


def test_zero_shot_averages_templates(root, clip, tmp_path, capsys):
    run(capsys, "--bench", "food101", "--root", root, "--ckpt", clip, "--json", tmp_path / "s.json")
    model, tokenizer, good = models.load(clip), models.load_tokenizer(clip), 0
    foods = ["apple pie", "red soup", "waffles"]
    with torch.inference_mode():
        classes = torch.stack([F.normalize(model.encode_text(data.tokenize(tokenizer, [t.format(food) for t in evaluation.TEMPLATES])), dim=-1).mean(0) for food in foods])
        for label, food in enumerate(foods):
            for i in range(3):
                cls = model.encode_image(data.to_pixels(Image.open(root / f"food-101/images/{food.replace(' ', '_')}/{i}.jpg"), 64)[None])[0]
                good += int(F.cosine_similarity(cls, classes).argmax()) == label
    assert json.loads((tmp_path / "s.json").read_text())["food101"] == {"top-1": pytest.approx(100 * good / 9), "top-5": 100}


def test_two_ranks_equal_one(root, clip, tmp_path, capsys):
    flags = ["--bench", "urban1k", "coco", "fgovd", "food101", "--root", str(root), "--ckpt", str(clip), "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "eval.py"]
    done = subprocess.run([*torchrun, *flags, str(tmp_path / "two.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = run(capsys, *flags, tmp_path / "one.json")
    assert done.stdout == printed
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())


def test_all_runs_what_is_there_and_lists_the_rest(root, clip, tmp_path, capsys):
    shutil.copytree(root / "Urban1k", tmp_path / "Urban1k")
    shutil.copy(root / data.SHAREGPT4V, tmp_path)  # without its images
    printed = run(capsys, "--bench", "all", "--root", tmp_path, "--ckpt", clip).splitlines()
    assert {line.split()[0] for line in printed[2:] if not line.startswith("not there")} == {"scenes", "urban1k"}
    missing = [line.split()[2] for line in printed if line.startswith("not there: ")]
    assert missing == ["sv1k", "dci", "coco", "flickr30k", "fgovd", "cifar10", "cifar100", "food101", "imagenet"]


def test_a_short_clip_is_stretched_with_a_note(root, tmp_path, tokenizer, capsys):
    CLIPModel(models.tiny_config(tokenizer, 32)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "77 text positions, stretched to 248" in run(capsys, "--bench", "urban1k", "--root", root, "--ckpt", tmp_path)
    assert "no trained pooler" in refused(capsys, "--bench", "urban1k", "--score", "pooled", "--root", root, "--ckpt", tmp_path)


def test_the_authors_checkpoint_with_its_tokenizer_beside(root, golden, tokenizer, tmp_path, capsys, monkeypatch):
    shutil.copy(golden / "authors_checkpoint.pt", tmp_path)
    assert "heads" in refused(capsys, "--bench", "urban1k", "--root", root, "--ckpt", tmp_path / "authors_checkpoint.pt")
    monkeypatch.setattr(models, "load", partial(models.load, heads=4))  # the golden model's heads are no 64 wide
    flags = ["--bench", "urban1k", "--root", root, "--ckpt", tmp_path / "authors_checkpoint.pt"]
    error = refused(capsys, *flags)
    assert f"save that tokenizer's files in {tmp_path}" in error and models.OPENAI in error
    tokenizer.save_pretrained(tmp_path)
    printed = run(capsys, *flags, "--json", tmp_path / "s.json")
    assert "stretched" not in printed and set(json.loads((tmp_path / "s.json").read_text())) == {"urban1k"}


def test_urban1k_is_unpacked_from_the_hub_and_offline_says_what_to_put_where(root, clip, tmp_path, capsys, monkeypatch):
    error = refused(capsys, "--bench", "urban1k", "--root", tmp_path / "none", "--ckpt", clip)
    assert "hub cannot be reached" in error and f"{tmp_path}/none/Urban1k/image" in error
    with zipfile.ZipFile(tmp_path / "Urban1k.zip", "w") as archive:
        for path in (root / "Urban1k").rglob("*.*"):
            archive.write(path, path.relative_to(root))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: str(tmp_path / "Urban1k.zip"))
    fetched, there = (run(capsys, "--bench", "urban1k", "--root", at, "--ckpt", clip) for at in (tmp_path / "new", root))
    assert fetched == there


BROKEN = {  # what is done to the stand-ins, the benchmark, and what the one line names
    "a missing image": (lambda root: (root / "Urban1k/image/3.jpg").unlink() or (root / "val2017/ü.jpg").unlink(), "coco", ["captions_val2017.json, image 3", "ü.jpg"]),
    "a missing caption": (lambda root: (root / "Urban1k/caption/3.txt").unlink(), "urban1k", ["caption/3.txt"]),
    "an empty caption": (lambda root: write(root / "Urban1k/caption/3.txt", "\nsecond line"), "urban1k", ["caption/3.txt", "empty"]),
    "a corrupt JPEG": (lambda root: (root / "Urban1k/image/3.jpg").write_bytes((root / "Urban1k/image/3.jpg").read_bytes()[:300]), "urban1k", ["image/3.jpg", "unreadable"]),
    "a zero-byte image": (lambda root: (root / "Urban1k/image/3.jpg").write_bytes(b""), "urban1k", ["image/3.jpg", "unreadable"]),
    "an empty set": (lambda root: shutil.rmtree(root / "Urban1k/image") or (root / "Urban1k/image").mkdir(), "urban1k", ["no images"]),
    "a truncated JSON": (lambda root: write(root / data.SHAREGPT4V, (root / data.SHAREGPT4V).read_text()[:1500]), "sv1k", [data.SHAREGPT4V, "row ", "cut off"]),
    "an image outside": (lambda root: write(root / data.SHAREGPT4V, [{"image": "../x.jpg", "caption": "x", "conversations": [{"from": "gpt", "value": "x"}]}]), "sv1k", ["row 1", "out of the root"]),
    "a broken row": (lambda root: write(root / "h_attributes_llava.jsonl", lines(fgovd_rows(random.Random(0))["hard"][:2]) + '{"img_path": 3}\n'), "fgovd", ["h_attributes_llava.jsonl, row 3", "img_path"]),
    "no negatives": (lambda root: write(root / "m_attributes_llava.jsonl", lines([fgovd_rows(random.Random(0))["hard"][0] | {"neg_expression": []}])), "fgovd", ["m_attributes_llava.jsonl, row 1", "neg_expression"]),
    "a box of three": (lambda root: write(root / "e_attributes_llava.jsonl", lines([fgovd_rows(random.Random(0))["hard"][0] | {"bbox": [1, 2, 3]}])), "fgovd", ["e_attributes_llava.jsonl, row 1", "bbox"]),
    "an empty file": (lambda root: write(root / "e_attributes_llava.jsonl", ""), "fgovd", ["e_attributes_llava.jsonl", "no rows"]),
    "an annotation without its text": (lambda root: write(root / "densely_captioned_images/annotations/2.json", {"image": "0.jpg", "extra_caption": 7}), "dci", ["annotations/2.json", "extra_caption"]),
    "a file of another kind": (lambda root: write(root / "captions_val2017.json", [1, 2]), "coco", ["captions_val2017.json, row 1"]),
    "a binary file": (lambda root: (root / "captions_val2017.json").write_bytes(b"\xff\xfe\x00" * 9), "coco", ["captions_val2017.json"]),
    "no file": (lambda root: (root / "shuffle_negatives_llava.jsonl").unlink(), "fgovd", ["shuffle_negatives_llava.jsonl"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_in_one_line(root, clip, tmp_path, capsys, case):
    breaks, bench, names = BROKEN[case]
    shutil.copytree(root, tmp_path / "data")
    breaks(tmp_path / "data")
    error = refused(capsys, "--bench", bench, "--root", tmp_path / "data", "--ckpt", clip)
    assert all(name in error for name in names), error


def test_unknown_names_are_refused_before_any_work(capsys):
    assert "--bench nowhere" in refused(capsys, "--bench", "nowhere")
    assert "at least one query" in refused(capsys, "--heatmap", "x.jpg")


def test_heatmap_is_bright_where_the_similarity_is(clip, root, tmp_path, capsys):
    path = root / "val2017" / NAMES[0]
    run(capsys, "--ckpt", clip, "--heatmap", path, "red circle", "a long query that needs more than a single line to be written", "--out", tmp_path / "heat.png")
    sheet, image = Image.open(tmp_path / "heat.png"), Image.open(path)
    assert sheet.width == 3 * (evaluation.TILE + 12) + 12
    model, tokenizer = models.load(clip), models.load_tokenizer(clip)
    with torch.inference_mode():
        patches = F.normalize(model.encode_image(data.to_pixels(image, 64, whole=True)[None])[1][0], dim=-1)
        similarity = patches @ F.normalize(model.encode_text(data.tokenize(tokenizer, ["red circle"]))[0], dim=-1)
    height = round(evaluation.TILE * image.height / image.width)
    red, _, blue = sheet.crop((24 + evaluation.TILE, 12, 24 + 2 * evaluation.TILE, 12 + height)).resize((8, 8), Image.Resampling.BOX).split()
    lit = torch.tensor([[red.getpixel((x, y)) - blue.getpixel((x, y)) for x in range(8)] for y in range(8)]).flatten()  # grey has none
    assert torch.corrcoef(torch.stack([lit, similarity]))[0, 1] > .8
