"""Metrics by hand; each benchmark, on a small stand-in in its real format, against stock transformers."""

import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial

import datasets
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import roi_align
from transformers import CLIPModel, CLIPProcessor

import data
import eval as evaluation
import model as models
from conftest import ROOT, new_model, picture, write

SHARED = ROOT.parent / "shared" / "data"
NAMES = ["a b.jpg", "ü.jpg", *(f"{i}.jpg" for i in range(7))]  # nine: no multiple of two ranks
DCI = "densely_captioned_images"
FOLDERS = {"urban1k": "Urban1k/image", "sv1k": "sam/images", "dci": f"{DCI}/photos", "coco": "val2017",
           "dci-short": f"{DCI}/photos", "flickr30k": "flickr30k-images"}

def test_metrics_by_hand():
    similarity = torch.tensor([[.9, .1, .0],   # text 0: its image first
                               [.8, .7, .6],   # text 1: its image second
                               [.9, .8, .1]])  # text 2: its image third
    scores = evaluation.recall(similarity, torch.arange(3), ks=(1, 2))
    assert scores["T2I R@1"] == pytest.approx(100 / 3) and scores["T2I R@2"] == pytest.approx(200 / 3)
    # image 0: .9 ties with text 2's, which counts against; image 1: .8 is above .7; image 2: .6 is above .1
    assert scores["I2T R@1"] == 0 and scores["I2T R@2"] == 100
    several = torch.tensor([[.2, .1], [.9, .3], [.5, .4], [.1, .8]])  # two texts an image
    assert evaluation.recall(several, torch.tensor([0, 0, 1, 1]), (1,)) == {"T2I R@1": 75, "I2T R@1": 100}
    for score in (0., torch.nan):  # equal scores, and NaN, earn nothing
        assert set(evaluation.recall(torch.full((20, 20), score), torch.arange(20)).values()) == {0}
    rows = [.5, .5, .1], [.5, .6, .1], [.5, .4], [torch.nan, torch.nan]
    assert [bool(evaluation.hit(torch.tensor(row))) for row in rows] == [True, False, True, False]
    patches = F.one_hot(torch.arange(16), 16).float()[None]         # 4 x 4 patches, each its own direction
    boxes = torch.tensor([[.25, .5, .25, .25], [0, 0, .5, .5]])     # patch (2, 1); the four at the top left
    regions = evaluation.box_embeddings(patches, boxes, torch.tensor([0, 0]))
    assert regions[0].argmax() == 9 and regions[0, 9] > .99
    assert regions[1].topk(4).indices.sort().values.tolist() == [0, 1, 4, 5]

@pytest.mark.parametrize("turn, score", [(0, 100), (1, 0)])
def test_pointing_takes_the_mean_over_a_quarter(tiny, tokenizer, monkeypatch, turn, score):
    drawn = [data.scene("test", index) for index in range(3)]
    descriptions = [data.expression(thing) for scene in drawn for thing in scene["objects"]]
    texts = evaluation.embed_texts(tiny.eval(), tokenizer, descriptions).detach().unflatten(0, (3, 4))
    grid = torch.empty(3, 8, 8, tiny.dim)
    for quarter, (y, x) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        grid[:, y:y + 4, x:x + 4] = 3 * texts[:, (quarter + turn) % 4, None, None]
        grid[:, y, x] = texts[:, (quarter + 2) % 4]  # one patch is as another quarter's
    monkeypatch.setattr(tiny, "encode_image", lambda pixels: (None, grid.flatten(1, 2)))
    assert evaluation.pointing(tiny, tokenizer, drawn, descriptions) == score

@pytest.fixture
def scores(tmp_path, capfd, monkeypatch):
    """Arguments of eval.py -> what it prints, and the scores in its --json, which must be the same."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*argv):
        evaluation.main([*map(str, argv), "--json", str(tmp_path / "scores.json")])
        printed, found = capfd.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
        assert evaluation.table(found) in printed
        return printed, found
    return run

@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """All benchmarks, in their real formats -> their folder, {bench: [(image, its captions)]}."""
    root, rng, pairs = tmp_path_factory.mktemp("data"), random.Random(0), {bench: [] for bench in FOLDERS}
    images = [{"id": i, "file_name": name} for i, name in enumerate(NAMES)]
    sharegpt4v, annotations, karpathy, expressions = [], [], [], []
    for i, name in enumerate(NAMES):
        sentences, phrases = data.describe(data.scene("train", i))
        long = ". ".join(sentences * 3).replace(" corner", "'s corner")  # over 248 tokens
        texts, answer = phrases[:5 + i % 2], f"{sentences[0]}.\nA{' red' * 60} star"
        captions = {"urban1k": [long], "sv1k": [data.clean(answer)], "dci": [long], "coco": texts,
                    "dci-short": [f"{texts[4]}\n{long}"], "flickr30k": texts}
        for bench, folder in FOLDERS.items():
            side = 64 * rng.randint(1, 3)  # of all aspects, with even margins: all libraries cut them alike
            size = rng.sample([side, side + side // 32 * rng.randint(0, 40)], 2)
            pairs[bench].append((f"{folder}/{name}", captions[bench]))
            picture(root / folder / name, size, rng.random())
        write(root / f"Urban1k/caption/{name[:-4]}.txt", long.replace("'", "’") + "\nNo caption\n")
        row = {"image": name, "short_caption": texts[4], "extra_caption": long}
        write(root / DCI / f"annotations/{i}.json", row)
        talk = [{"from": "gpt", "value": answer}]
        sharegpt4v.append({"image": f"sam/images/{name}", "conversations": talk})
        annotations += [{"image_id": i, "caption": text} for text in texts]
        raw = [{"raw": text} for text in texts]
        karpathy.append({"filename": name, "split": "test" if i else "val", "sentences": raw})
        expressions += phrases
    del pairs["flickr30k"][0]  # it is of another split
    write(root / data.SHAREGPT4V, sharegpt4v)
    write(root / DCI / "splits.json", {"train": ["0.json"], "test": [f"{i}.json" for i in range(1, 9)]})
    write(root / "captions_val2017.json", {"images": images, "annotations": annotations})
    write(root / "dataset_flickr30k.json", {"images": karpathy})
    soups = {f"{colour}_soup": [f"{colour}_soup/{i}" for i in range(4)] for colour in data.COLOURS}
    for seed, name in enumerate(sum(soups.values(), [])):
        picture(root / f"food-101/images/{name}.jpg", (64, 64), seed)
    write(root / "food-101/meta/test.json", soups)
    for file in evaluation.FGOVD.values():
        rows = [{"img_path": f"val2017/{rng.choice(NAMES)}", "pos_expression": [rng.choice(expressions)],
                 "neg_expression": rng.sample(expressions, rng.randint(2, 10)),
                 "bbox": [rng.uniform(low, 25) for low in (0, 0, 3, 3)]} for _ in range(30)]
        write(root / file, "\n".join(map(json.dumps, rows)))
    rows = [{"image": image, "caption": text} for image, texts in pairs["coco"] for text in texts]
    rng.shuffle(rows)
    write(root / "pairs.jsonl", "\n".join(map(json.dumps, rows)))
    write(root / "lists.json", [{"file": image, "texts": texts} for image, texts in pairs["coco"]])
    rows = [row | {"image": {"bytes": (root / row["image"]).read_bytes()}} for row in rows]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(root / "pairs.parquet")
    return root, pairs

class Stock:
    """transformers' own CLIP and processor, on one image or one text at a time."""

    def __init__(self, folder, size=64):
        self.clip, self.process = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
        self.sizes = dict(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    @torch.inference_mode()
    def image(self, path):
        pixels = self.process(images=Image.open(path).convert("RGB"), return_tensors="pt", **self.sizes)
        return self.clip.get_image_features(**pixels, interpolate_pos_encoding=True).pooler_output[0]

    @torch.inference_mode()
    def text(self, text):
        ids = self.process(text=text, return_tensors="pt", truncation=True)
        return self.clip.get_text_features(**ids).pooler_output[0]

    def recall(self, root, pairs):
        """R@k, ranks counted in plain loops."""
        images = torch.stack([self.image(root / image) for image, _ in pairs])
        rows = [(own, F.cosine_similarity(self.text(text), images).tolist())
                for own, (_, texts) in enumerate(pairs) for text in texts]
        ranks = {"T2I": [sum(x >= row[own] for x in row) - 1 for own, row in rows], "I2T": []}
        for image in range(len(pairs)):
            ranked = sorted(rows, key=lambda one: (-one[1][image], one[0] == image))
            ranks["I2T"].append([own for own, _ in ranked].index(image))
        return pytest.approx({f"{way} R@{k}": 100 * sum(rank < k for rank in found) / len(found)
                              for way, found in ranks.items() for k in (1, 5, 10)})

@pytest.mark.parametrize("flags", [*evaluation.RETRIEVAL, "coco --size 128", "pairs.jsonl", "pairs.parquet",
                                   "lists.json --columns file,texts"])
def test_retrieval_equals_stock_transformers(stand_ins, clip, scores, monkeypatch, flags):
    (root, pairs), bench = stand_ins, flags.split()[0]
    monkeypatch.chdir(root)
    _, found = scores("--root", root, "--ckpt", clip, "--bench", *flags.split())
    stock = Stock(clip, 128 if "128" in flags else 64)
    assert found[bench] == stock.recall(root, pairs.get(bench, pairs["coco"]))

def one_box_at_a_time(clip, root, split):
    """FG-OVD's protocol, row by row, without any of eval.py."""
    (model, tokenizer), good = evaluation.load(clip), []
    model.requires_grad_(False)
    for row in map(json.loads, (root / evaluation.FGOVD[split]).read_text().splitlines()):
        image = Image.open(root / row["img_path"]).convert("RGB")
        grid = model.encode_image(data.normalize(data.to_pixels(image.resize((64, 64)), 64)[None]))[1]
        x, y, w, h = row["bbox"]
        corners = torch.tensor([[x, y, x + w, y + h]]) * 8 / torch.tensor(image.size * 2)
        region = roi_align(grid.transpose(1, 2).unflatten(2, (8, 8)), [corners], 1, aligned=True).flatten()
        ids = tokenizer(row["pos_expression"] + row["neg_expression"])["input_ids"]
        scores = F.cosine_similarity(region, model.encode_text([torch.tensor(text) for text in ids]))
        good.append(bool(scores[0] >= scores[1:].max()))
    return pytest.approx(100 * sum(good) / len(good))

@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_real_annotations(clip, scores, tmp_path):
    shutil.copytree(SHARED / "fgovd", tmp_path, dirs_exist_ok=True)
    for file in evaluation.FGOVD.values():
        for row in map(json.loads, (tmp_path / file).read_text().splitlines()):
            picture(tmp_path / row["img_path"], (row["width"], row["height"]), row["image_id"])
    pairs = []
    for row in json.loads((SHARED / "urban1k_captions.json").read_text()):
        caption = row["caption"].translate(data.QUOTES)
        if caption.isascii():  # the scenes' tokenizer knows no other characters
            picture(tmp_path / "Urban1k/image" / row["image"], (64, 64 + 2 * len(pairs)), len(pairs))
            write(tmp_path / f"Urban1k/caption/{row['image'][:-4]}.txt", row["caption"] + "\n")
            pairs.append((f"Urban1k/image/{row['image']}", [caption]))
    printed, found = scores("--bench", "fgovd", "urban1k", "--root", tmp_path, "--ckpt", clip)
    assert "ce 30.9, bce 20.1" in printed and "ce 89.0, bce 91.8" in printed  # the paper's, beside ours
    assert found["fgovd"]["hard"] == one_box_at_a_time(clip, tmp_path, "hard")
    assert found["urban1k"] == Stock(clip).recall(tmp_path, pairs)

def test_zero_shot_averages_templates(stand_ins, clip, scores, monkeypatch):
    monkeypatch.setattr(evaluation, "TEMPLATES", ("{}", "a blue circle, {}", "{} in the top left"))
    (root, _), stock, names = stand_ins, Stock(clip), sorted(f"{colour}_soup" for colour in data.COLOURS)
    embed = lambda name: torch.stack([stock.text(one.format(name)) for one in evaluation.TEMPLATES])
    classes = [F.normalize(embed(name.replace("_", " ")), dim=1).mean(0) for name in names]
    ranks = []
    for path in (root / "food-101/images").rglob("*.jpg"):
        order = F.cosine_similarity(stock.image(path), torch.stack(classes)).argsort(descending=True).tolist()
        ranks.append(order.index(names.index(path.parent.name)))
    _, found = scores("--bench", "food101", "--root", root, "--ckpt", clip)
    assert found["food101"] == pytest.approx({f"top-{k}": sum(x < k for x in ranks) / .36 for k in (1, 5)})

def test_fgovd_equals_one_box_at_a_time_and_two_ranks_one(stand_ins, clip, scores, tmp_path, monkeypatch):
    root, _ = stand_ins
    monkeypatch.setitem(data.SPLITS, "test", 40)
    script = write(tmp_path / "run.py", "import data, eval\ndata.SPLITS['test'] = 40\neval.main()")
    benches = ["--bench", "scenes", "fgovd", "food101", root / "lists.json", "--columns", "file,texts"]
    printed, found = scores("--root", root, "--ckpt", clip, *benches)
    assert found["fgovd"] == {split: one_box_at_a_time(clip, root, split) for split in evaluation.FGOVD}
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split(), script,
                "--root", root, "--ckpt", clip, *benches]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    two = subprocess.run(torchrun, capture_output=True, text=True, env=environment)
    assert two.returncode == 0 and two.stdout == printed, two.stderr

def test_all_runs_what_is_present_on_a_clip_of_77_positions(stand_ins, clip, scores, tmp_path, monkeypatch):
    monkeypatch.setitem(data.SPLITS, "test", 40)
    shutil.copytree(stand_ins[0] / "Urban1k", tmp_path / "data/Urban1k")
    short = shutil.copytree(clip, tmp_path / "short")
    new_model(short, max_position_embeddings=77)
    printed, found = scores("--bench", "all", "--root", tmp_path / "data", "--ckpt", short)
    recalls = [f"{way} R@{k}" for way in ("T2I", "I2T") for k in (1, 5, 10)]
    assert {bench: list(metrics) for bench, metrics in found.items()} == {
        "scenes": ["hard", "medium", "easy", "trivial", "pointing", *recalls], "urban1k": recalls}
    rest = [f"{bench} ({file})" for bench, file in evaluation.FILES.items() if bench != "urban1k"]
    assert printed.splitlines()[-1] == "not there: " + ", ".join(rest)
    assert printed.startswith(f"{short} (77 text positions, stretched to 248)\n") and "chance 25" in printed

def test_the_authors_model_needs_a_tokenizer(stand_ins, tokenizer, scores, refused, tmp_path, monkeypatch):
    file = shutil.copy(ROOT / "tests/golden/authors_checkpoint.pt", tmp_path)
    flags = ["--bench", "coco", "--root", stand_ins[0], "--ckpt", file]
    assert "heads" in refused(evaluation.main, *flags)
    monkeypatch.setattr(models, "load", partial(models.load, heads=4))  # its heads are no 64 wide
    assert f"{models.OPENAI} has a tokenizer of" in refused(evaluation.main, *flags)
    tokenizer.save_pretrained(tmp_path)
    printed, found = scores(*flags)
    expected = evaluation.evaluate(models.load(file), tokenizer, "coco", stand_ins[0])
    assert found["coco"] == expected and "stretched" not in printed

def test_urban1k_is_fetched_or_asked_for(stand_ins, clip, scores, refused, tmp_path, monkeypatch):
    (root, pairs), new = stand_ins, tmp_path / "new"
    flags = ["--bench", "urban1k", "--root", new, "--ckpt", clip]
    monkeypatch.setattr(evaluation, "URBAN1K", "file:///nowhere/Urban1k.zip")
    error = refused(evaluation.main, *flags).split(": ", 1)[1]
    assert error.startswith(f"{evaluation.URBAN1K} cannot be fetched") and f"unpack it in {new}" in error
    archive = shutil.make_archive(tmp_path / "Urban1k", "zip", root, "Urban1k")
    fetch = lambda url, to: shutil.unpack_archive(archive, to)
    monkeypatch.setattr(evaluation.datasets.utils, "download_and_extract_archive", fetch)
    assert scores(*flags)[1]["urban1k"] == Stock(clip).recall(root, pairs["urban1k"])

@pytest.mark.parametrize("size", [(64, 64), (1, 1), (2000, 2)])
def test_heatmaps_equal_their_definitions_and_have_a_row_per_model_and_kind(clip, tmp_path, size):
    (model, tokenizer), queries = evaluation.load(clip), ["a red star", "🦊 雪", "نص عربي", "x" * 1000]
    attn = model.requires_grad_(False).pooler.attn
    file = picture(tmp_path / "a.png", size)
    found = evaluation.heatmaps(model, tokenizer, Image.open(file), queries)
    pixels = data.to_pixels(Image.open(file).resize((64, 64)), 64)
    patches = model.encode_image(data.normalize(pixels[None]))[1][0]
    texts = model.encode_text([torch.tensor(ids) for ids in data.tokenize(tokenizer, queries)])
    cosine = torch.stack([F.cosine_similarity(text, patches) for text in texts]).view(4, 8, 8).numpy()
    assert found["cosine of patches"] == pytest.approx(cosine, abs=1e-6)
    parts = zip((texts, patches), attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3))
    q, k = (F.linear(F.normalize(x, dim=1), *part).view(-1, 8, 16).transpose(0, 1) for x, *part in parts)
    attention = (q @ k.transpose(1, 2) / 16 ** 0.5).softmax(2).mean(0).view(4, 8, 8).numpy()
    assert found["attention of the pooler"] == pytest.approx(attention, abs=1e-6)
    assert found["attention of the pooler"].sum((1, 2)) == pytest.approx(1)
    model.has_trained_pooler = False  # such a model has one row
    models.export(model, tokenizer, tmp_path / "plain")
    flags = ["--heatmap", file, *queries, "--ckpt", clip, tmp_path / "plain", "--out", tmp_path / "heat.png"]
    evaluation.main([*map(str, flags)])
    sheet = Image.open(tmp_path / "heat.png")
    assert sheet.size == (5 * (evaluation.TILE + 12), 3 * (evaluation.TILE + evaluation.LABEL))
    drawn = sheet.crop((338, 6, 658, 326)).resize((8, 8), Image.Resampling.BOX)  # of the first query
    red, _, blue = data.to_pixels(drawn, 8).float()  # heat is red; grey has as much blue
    assert torch.stack([red - blue, torch.tensor(cosine[0])]).flatten(1).corrcoef()[0, 1] > .8
