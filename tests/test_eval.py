"""Metrics by hand; small stand-ins of all benchmarks, against stock transformers; broken ones."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import change_text_config, make_image, write_file
from PIL import Image
from torchvision.ops import roi_align
from transformers import CLIPModel, CLIPProcessor

import data
import eval as evaluation
import model as models

NAMES = ["a b.jpg", "ü.jpg", *(f"{i}.jpg" for i in range(7))]
SV1K = "share-captioner_coco_lcs_sam_1246k_1107_filtered.json"
DCI = "densely_captioned_images"
COCO = "captions_val2017.json"
FOLDERS = {"urban1k": "Urban1k/image", "sv1k": "sam/images", "coco": "val2017",
           "dci": f"{DCI}/photos", "dci-short": f"{DCI}/photos"}
FGOVD = {  # FG-CLIP's files, and the official ones
    "hard": ("h_attributes_llava.jsonl", "1_attributes.json"),
    "medium": ("m_attributes_llava.jsonl", "2_attributes.json"),
    "easy": ("e_attributes_llava.jsonl", "3_attributes.json"),
    "trivial": ("shuffle_negatives_llava.jsonl", "shuffle_negatives.json")}
HARD = FGOVD["hard"][0]
BOX = {"img_path": "val2017/0.jpg", "bbox": [5, 5, 9, 9],
       "pos_expression": ["x"], "neg_expression": ["y"]}
MISSING = ["train2017/x.jpg", "val2017/y.jpg", "train2017/z.jpg"]
RECALLS = [f"{way} R@{k}" for way in ("T2I", "I2T") for k in (1, 5, 10)]
POOLED_RECALLS = [f"pooled {name}" for name in RECALLS]


@pytest.fixture(autouse=True)
def small_batches_and_own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 4)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """All benchmarks, in their real formats: their folder, {benchmark: [(image, its captions)]}."""
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    pairs = {benchmark: [] for benchmark in FOLDERS}
    sharegpt4v = []
    coco = {"images": [], "annotations": []}
    all_texts = []
    for i, name in enumerate(NAMES):
        sentences, phrases = data.describe_scene(data.make_scene("train", i))
        texts = data.order_phrases(phrases) + sentences
        all_texts += texts
        long_caption = ". ".join(sentences * 4).replace(" corner", "'s corner")  # over 248 tokens
        answer = f"{sentences[0]}.\nA{' red' * 60} star"
        captions = {"urban1k": [long_caption], "sv1k": [data.remove_repetitions(answer)],
                    "dci": [long_caption], "dci-short": [f"{sentences[0]}\n{long_caption}"],
                    "coco": texts[:5]}
        if i == 0:  # some of Urban1K's files hold an empty caption
            captions |= {"urban1k": [""], "coco": ["", *texts[1:5]]}
        for benchmark, folder in FOLDERS.items():
            # of all aspect ratios, with even margins, so that all libraries crop them alike
            side = 64 * rng.randint(1, 3)
            size = rng.sample([side, side + side // 32 * rng.randint(0, 40)], 2)
            make_image(root / folder / name, size, rng.random())
            pairs[benchmark].append((f"{folder}/{name}", captions[benchmark]))
        text = long_caption.replace("'", "’") + "\nNot a caption\n" if i else ""
        write_file(root / f"Urban1k/caption/{name[:-4]}.txt", text)
        row = {"image": name, "short_caption": sentences[0], "extra_caption": long_caption}
        write_file(root / DCI / f"annotations/{i}.json", row)
        talk = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": answer}]
        sharegpt4v.append({"image": f"sam/images/{name}", "conversations": talk})
        coco["images"].append({"id": i, "file_name": name})
        for text in captions["coco"] + texts[5:5 + i % 3]:  # of up to seven captions, five count
            coco["annotations"].append({"image_id": i, "caption": text})
    write_file(root / SV1K, sharegpt4v)
    write_file(root / SV1K.replace("_filtered", ""), "The public list, which is not read")
    splits = {"train": ["0.json"], "test": [f"{i}.json" for i in range(1, 9)]}
    write_file(root / DCI / "splits.json", splits)
    write_file(root / COCO, coco)
    for lines, _ in FGOVD.values():
        rows = [{"img_path": f"val2017/{rng.choice(NAMES)}",
                 "bbox": [rng.uniform(low, 25) for low in (0, 0, 3, 3)],
                 "pos_expression": [rng.choice(all_texts)],
                 "neg_expression": rng.sample(all_texts, rng.randint(2, 10))} for _ in range(30)]
        for row in rows[::2]:  # in a few real rows, too, the right text is also a wrong one
            row["neg_expression"] += row["pos_expression"]
        write_file(root / lines, "\n".join(map(json.dumps, rows)))
    rows = [{"image": image, "caption": text} for image, texts in pairs["coco"] for text in texts]
    rng.shuffle(rows)
    write_file(root / "flickr30k.json", rows)
    rows = [row | {"image": {"bytes": (root / row["image"]).read_bytes()}} for row in rows]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.rename_columns({"image": "file", "caption": "text"}).to_parquet(root / "pairs.parquet")
    return root, pairs


class Stock:
    """transformers' own CLIP and processor, on one image or one text at a time."""

    def __init__(self, folder):
        self.clip = CLIPModel.from_pretrained(folder).requires_grad_(False)
        self.processor = CLIPProcessor.from_pretrained(folder)

    def embed_image(self, path):
        pixels = self.processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
        return self.clip.get_image_features(**pixels).pooler_output[0]

    def embed_text(self, text):
        ids = self.processor(text=text, return_tensors="pt", truncation=True)
        return self.clip.get_text_features(**ids).pooler_output[0]

    def recall(self, root, pairs):
        images = torch.stack([self.embed_image(root / image) for image, _ in pairs])
        captions = [(text, index) for index, (_, texts) in enumerate(pairs) for text in texts]
        similarity = [F.cosine_similarity(self.embed_text(text), images).tolist()
                      for text, _ in captions]
        return count_recall(similarity, similarity, [index for _, index in captions])


def count_recall(t2i, i2t, image_of_text):
    """R@k of similarities [text][image], for either way, by ranks counted in plain loops."""
    t2i_ranks = [sum(score >= row[own] for score in row) - 1
                 for row, own in zip(t2i, image_of_text, strict=True)]
    i2t_ranks = []
    for image in range(len(i2t[0])):
        texts = sorted(zip(i2t, image_of_text, strict=True),
                       key=lambda text: (-text[0][image], text[1] == image))
        i2t_ranks.append([own for _, own in texts].index(image))
    return {f"{way} R@{k}": pytest.approx(100 * sum(rank < k for rank in ranks) / len(ranks))
            for way, ranks in (("T2I", t2i_ranks), ("I2T", i2t_ranks)) for k in (1, 5, 10)}


def fgovd_by_definition(clip_folder, root):
    """The scores of FG-OVD, one box at a time, without any of eval.py."""
    model, tokenizer = models.load(clip_folder)
    model.requires_grad_(False)
    scores = {}
    for difficulty, (lines, _) in FGOVD.items():
        hits = []
        for row in evaluation.read_json(root / lines):
            image = Image.open(root / row["img_path"]).convert("RGB")
            pixels = data.to_pixels(image.resize((64, 64)), 64)
            grid = model.encode_image(pixels[None])[1].transpose(1, 2).unflatten(2, (4, 4))
            x, y, width, height = row["bbox"]
            box = torch.tensor([[x, y, x + width, y + height]]) * 4 / torch.tensor(image.size * 2)
            region = roi_align(grid, [box], 1, aligned=True).flatten()
            ids = tokenizer(row["pos_expression"] + row["neg_expression"])["input_ids"]
            similarity = F.cosine_similarity(region, model.encode_text(models.pack(ids)))
            hits.append(bool(similarity[0] >= similarity[1:].max()))
        scores[difficulty] = pytest.approx(100 * sum(hits) / len(hits))
    return scores


def measure(clip_folder, benchmark, root, columns=None):
    """Read a benchmark and evaluate the model in a folder on it. Returns it, scores, and table."""
    task = evaluation.load_benchmark(str(benchmark), root, columns)
    scores = evaluation.evaluate(*models.load(clip_folder), task)
    return task, scores, evaluation.format_table(task, {"model": scores})


def test_recall_by_hand():
    similarity = torch.tensor([[.9, .1, .0],   # text 0: its image first
                               [.8, .7, .7],   # text 1: its image third, since a tie does not help
                               [.9, .8, .1]])  # text 2: its image third
    # image 0: .9 ties with text 2's; image 1: .8 is above its .7; image 2: .7 is above its .1
    scores = evaluation.recall(similarity, torch.arange(3), ks=(1, 2))
    expected = {"T2I R@1": 100 / 3, "T2I R@2": 100 / 3, "I2T R@1": 0, "I2T R@2": 100}
    assert scores == pytest.approx(expected)


def test_nan_earns_nothing(clip_folder, fast_scenes):
    model, tokenizer = models.load(clip_folder)
    model.clip.visual_projection.weight.data.fill_(torch.nan)
    task = evaluation.load_benchmark("scenes", ".")
    scores = evaluation.evaluate(model, tokenizer, task, conditioned=True)
    assert scores == dict.fromkeys([*FGOVD, "pointing", *RECALLS, *POOLED_RECALLS], 0)


@pytest.mark.parametrize("benchmark, source, reference", [
    ("urban1k", " (Urban1k)", "CE 89.0, BCE 91.8"), ("flickr30k.json", "", "CE 64.0*"),
    ("sv1k", f" ({SV1K})", "CE 93.7, BCE 94.4"), ("dci", f" ({DCI})", "CE 59.9, BCE 65.1"),
    ("dci-short", f" ({DCI})", ""), ("coco", f" ({COCO})", "CE 33.2*"), ("pairs.parquet", "", "")])
def test_retrieval_equals_stock_transformers(stand_ins, clip_folder, monkeypatch, capfd, benchmark,
                                             source, reference):
    root, pairs = stand_ins
    monkeypatch.chdir(root)
    pairs = pairs.get(benchmark, pairs["coco"])
    columns = "file,text" if benchmark == "pairs.parquet" else None
    task, scores, table = measure(clip_folder, benchmark, root, columns)
    assert scores == Stock(clip_folder).recall(root, pairs)
    all_texts = [text for _, texts in pairs for text in texts]
    texts_read = [text.replace("’", "'") for row in task.rows for text in row.texts]
    assert sorted(texts_read) == sorted(all_texts)
    lines = table.splitlines()
    assert lines[0] == f"{benchmark}{source}: 9 images, {len(all_texts)} texts"
    assert lines[2].split() == ["T2I", "R@1", f"{scores['T2I R@1']:.1f}", *reference.split()]
    assert capfd.readouterr().err.count(f"note: 1 texts of {benchmark}") == all_texts.count("")


def test_fgovd_equals_one_box_at_a_time(stand_ins, clip_folder, tmp_path):
    root, _ = stand_ins
    shutil.copytree(root / "val2017", tmp_path / "val2017")
    images = [{"id": i, "file_name": f"val2017/{name}"} for i, name in enumerate(NAMES)]
    for image in images[::2]:
        image["coco_url"] = f"http://images.cocodataset.org/{image['file_name']}"
        image["file_name"] = image["file_name"].removeprefix("val2017/")
    for lines, official in FGOVD.values():
        annotations = evaluation.read_json(root / lines)
        for row in annotations:
            row["image_id"] = NAMES.index(row.pop("img_path").removeprefix("val2017/"))
            [row["pos_expression"]] = row["pos_expression"]
        write_file(tmp_path / official, {"images": images, "annotations": annotations})
    expected = fgovd_by_definition(clip_folder, root)
    for folder in (root, tmp_path):
        _, scores, table = measure(clip_folder, "fgovd", folder)
        assert scores == expected
        assert "9 images, 120 boxes" in table and "CE 30.9, BCE 20.1" in table


@pytest.mark.parametrize("split", ["test", "validation", "val", "dev", "train"])
def test_an_evaluation_split_is_measured_if_any(stand_ins, clip_folder, tmp_path, split):
    root, pairs = stand_ins
    rows = [{"image": image, "caption": texts} for image, texts in pairs["coco"]]
    write_file(tmp_path / "mine/data/train-00000-of-00001.json", rows[:4])
    write_file(tmp_path / f"mine/data/{split}-00000-of-00001.json", rows[4:])
    _, scores, table = measure(clip_folder, tmp_path / "mine", root)
    assert scores == Stock(clip_folder).recall(root, pairs["coco"][4:])
    assert table.startswith(f"{tmp_path / 'mine'} ({split}): 5 images, 25 texts\n")


def test_two_models_are_two_columns_of_all_that_is_found_and_of_a_file(
        stand_ins, clip_folder, tokenizer, tmp_path, monkeypatch, capfd, fast_scenes):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stand_ins[0] / "Urban1k", "Urban1k")
    models.export(models.build_small_model(tokenizer, 64), tokenizer, tmp_path / "plain")
    change_text_config("plain", max_position_embeddings=77)  # no pooler; positions are stretched
    folders = [str(clip_folder), "plain"]
    file = str(stand_ins[0] / "pairs.parquet")
    flags = f"--root . --columns file,text --conditioned --json a.json --bench all {file}"
    evaluation.main([*flags.split(), "--ckpt", *folders])
    tables = ""
    records = []
    for benchmark in ("scenes", "urban1k", file):
        task = evaluation.load_benchmark(benchmark, ".", "file,text")
        alone = {folder: evaluation.evaluate(*models.load(folder), task, conditioned=True)
                 for folder in folders}
        tables += evaluation.format_table(task, alone) + "\n"
        about = {"benchmark": benchmark, "split": task.source, **task.counts()}
        records += [about | {"model": folder, "metric": metric, "score": score}
                    for folder in folders for metric, score in alone[folder].items()]
    assert capfd.readouterr().out == tables
    assert json.loads((tmp_path / "a.json").read_text()) == records
    lines = tables.splitlines()
    assert lines[1].split() == ["metric", *folders, "reference"]
    assert lines[6].startswith("pointing ") and lines[6].endswith(" chance 25.0")
    score = alone[str(clip_folder)]["pooled T2I R@1"]  # the other model has no pooler
    assert lines[-6].split() == ["pooled", "T2I", "R@1", f"{score:.1f}"]


@pytest.mark.parametrize("limit", [128, 3])
def test_conditioned_retrieval_equals_a_double_loop(stand_ins, clip_folder, monkeypatch, limit):
    monkeypatch.setattr(evaluation, "CANDIDATES", limit)
    model, tokenizer = models.load(clip_folder)
    model.double().requires_grad_(False)  # in double precision, no rank hangs on rounding
    model.pooler.mlp[2].weight *= 100  # what is pooled has different lengths
    task = evaluation.load_benchmark("coco", stand_ins[0])
    texts, image_of_text = evaluation.embed_captions(model, tokenizer, task.rows)
    by_cls = texts @ evaluation.embed_images(model, task.images).T
    by_pooled = torch.zeros_like(by_cls)
    t2i_rank = torch.zeros_like(by_cls)
    i2t_rank = torch.zeros_like(by_cls)
    for image, path in enumerate(task.images):
        _, patches = model.encode_image(data.to_pixels(Image.open(path), 64)[None])
        for text in range(len(texts)):
            pooled = model.pooler(texts[text:text + 1], torch.tensor([0]), patches)
            by_pooled[text, image] = F.cosine_similarity(pooled[0], texts[text], dim=0)
            t2i_rank[text, image] = (by_cls[text] > by_cls[text, image]).sum()
            i2t_rank[text, image] = (by_cls[:, image] > by_cls[text, image]).sum()
    t2i = by_pooled.masked_fill(t2i_rank >= limit, -torch.inf).tolist()
    i2t = by_pooled.masked_fill(i2t_rank >= limit, -torch.inf).tolist()
    expected = count_recall(t2i, i2t, image_of_text.tolist())
    scores = evaluation.evaluate(model, tokenizer, task, conditioned=True)
    assert [scores[name] for name in POOLED_RECALLS] == [expected[name] for name in RECALLS]


def test_embeddings_equal_stock_transformers(tiny_model, tokenizer, clip_folder, tmp_path):
    paths = [make_image(tmp_path / f"{i}.png", (64, 64), seed=i) for i in range(3)]
    captions = ["a red star", "", "a blue circle " * 200]
    stock = Stock(clip_folder)
    expected = [torch.stack([stock.embed_image(path) for path in paths]),
                torch.stack([stock.embed_text(caption) for caption in captions])]
    expected = [F.normalize(embeddings, dim=1) for embeddings in expected]
    turned = Image.open(paths[0]).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: turn it by 90 degrees, clockwise
    turned.save(paths[0], exif=exif)
    images = evaluation.embed_images(tiny_model, paths)  # a model in training mode
    texts = evaluation.embed_texts(tiny_model, tokenizer, captions)
    assert not images.requires_grad and not texts.requires_grad
    torch.testing.assert_close([images, texts], expected, atol=1e-5, rtol=0)
    assert torch.equal(evaluation.embed_images(tiny_model, [Image.open(p) for p in paths]), images)


@pytest.mark.parametrize("size, resized, left, top", [
    ((90, 70), (82, 64), 9, 0), ((2, 2000), (64, 64_000), 0, 31_968)])
def test_heatmaps_equal_their_definitions(clip_folder, tmp_path, size, resized, left, top):
    model, tokenizer = models.load(clip_folder)
    attn = model.requires_grad_(False).pooler.attn
    queries = ["a red star", "🦊 雪", "نص عربي", "x" * 1000]
    image = Image.open(make_image(tmp_path / "a.png", size))
    centre = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 64, top + 64))
    patches = model.encode_image(data.to_pixels(centre, 64)[None])[1][0]
    texts = model.encode_text(models.pack(data.tokenize(tokenizer, queries)))
    similarity = torch.stack([F.cosine_similarity(text, patches) for text in texts])
    query_weight, key_weight, _ = attn.in_proj_weight.chunk(3)
    query_bias, key_bias, _ = attn.in_proj_bias.chunk(3)
    query = F.linear(F.normalize(texts, dim=1), query_weight, query_bias)
    key = F.linear(F.normalize(patches, dim=1), key_weight, key_bias)
    query, key = (x.view(-1, 8, 16).transpose(0, 1) for x in (query, key))          # 8 heads
    attention = (query @ key.transpose(1, 2) / 16 ** 0.5).softmax(2).mean(0)
    heatmaps = evaluation.compute_heatmaps(model, tokenizer, image, queries)
    expected = {"similarity": similarity.view(4, 4, 4), "attention": attention.view(4, 4, 4)}
    torch.testing.assert_close(heatmaps, expected, atol=1e-6, rtol=0)
    model.use_pooler = False
    assert list(evaluation.compute_heatmaps(model, tokenizer, image, queries)) == ["similarity"]


# ---- what is broken ------------------------------------------------------------------------------
@pytest.mark.parametrize("benchmarks, file, content, pattern", [
    ("coco", COCO, "cut", f"{COCO} cannot be read"),
    ("coco", COCO, {"images": [{"id": 0, "file_name": "x"}], "annotations": []}, f"{COCO}, row 1"),
    ("coco", "val2017/ü.jpg", "cut", "val2017/ü.jpg.*cannot be read"),
    ("urban1k", "Urban1k/caption/ü.txt", b"\xff", "Urban1k/caption/ü.txt cannot be read"),
    ("a.json", "a.json", [{"image": "0.jpg", "caption": None}], "a.json, row 1.*for 0.jpg"),
    ("fgovd", HARD, json.dumps(BOX) + '\n{"img_path": "a.jpg"}', f"{HARD}, row 2.*pos_expression"),
    ("fgovd", HARD, BOX | {"neg_expression": None}, f"{HARD}, row 1.*a wrong text"),
    ("fgovd", HARD, BOX | {"bbox": [5, 5, 20]}, f"{HARD}, row 1.*bbox"),
    ("fgovd", HARD, BOX | {"bbox": None}, f"{HARD}, row 1.*bbox"),
    ("fgovd", HARD, BOX | {"bbox": [5, 5, 20, 0]}, f"{HARD}, row 1.*bbox"),
    ("fgovd", HARD, BOX | {"bbox": [999, 5, 20, 30]}, "val2017/0.jpg.*999.*outside of"),
    ("fgovd", HARD, "", f"{HARD}.*no rows"),
    ("coco fgovd", HARD, "\n".join(json.dumps(BOX | {"img_path": name}) for name in MISSING),
     r"3 of 12 images are missing \(2 in train2017, 1 in val2017\)")])
def test_broken_benchmarks(stand_ins, run_and_fail, clip_folder, tmp_path, monkeypatch, benchmarks,
                           file, content, pattern):
    monkeypatch.chdir(shutil.copytree(stand_ins[0], tmp_path / "data"))
    if content == "cut":
        os.truncate(file, 300)
    else:
        write_file(Path(file), content)
    if "missing" in pattern:  # all images are looked for before anything is encoded
        monkeypatch.delattr(models.BetaCLIP, "encode_text")
    flags = ["--bench", *benchmarks.split(), "--root", ".", "--ckpt", clip_folder]
    assert re.search(pattern, run_and_fail(evaluation.main, *flags))
