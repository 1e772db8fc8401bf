"""Images and captions on disk: captions to queries, every form of data, odd and bad input."""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas
import pytest
import torch
from conftest import ROOT, SHARED, make_image, write_file
from PIL import Image, ImageChops

import data
import eval as evaluation
import model as models
import train

FILE = Path("a.json")  # in the working folder, as IMAGES
IMAGES = Path("images")
ROW = {"image": "a.png", "caption": "x"}
FLAGS = ["--data", "a.json", "--root", "images", "--phrases", "0", "--workers", "0",
         "--batch-size", "4", "--out", "run", "--model"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with an image, no cache of `datasets`, no model of spaCy, and no crops."""
    def whole_image(_, image, *args):
        return 0, 0, image.size[1], image.size[0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(data.RandomResizedCrop, "get_params", whole_image)
    monkeypatch.setitem(sys.modules, "en_core_web_sm", None)
    data.load_spacy.cache_clear()
    make_image(IMAGES / "a.png")


def read(source=FILE, root=IMAGES, sentences=5, phrases=0, columns=None):
    return data.Captions(source, root, 64, (sentences, phrases), columns=columns)


def read_texts(source=FILE, root=IMAGES):
    """The caption query of each sample."""
    samples = read(source, root)
    return [samples[0, index][1][0][0] for index in range(len(samples))]


def write_captions(captions, path=FILE):
    write_file(path, [ROW | {"caption": caption} for caption in captions])


def test_sentences_golden(golden):
    for case in json.loads((golden / "sentences.json").read_text()):
        assert data.remove_repetitions(case["caption"]) == case["clean"]
        assert data.split_sentences(case["clean"]) == case["sentences"]


@pytest.mark.parametrize("file, least", [
    ("phrases.json", 7), (SHARED / "phrases_trained.json", 44)])
def test_phrases_are_the_authors_and_two_processes_parse_once(golden, monkeypatch, file, least):
    spacy = pytest.importorskip("spacy")
    if not (golden / file).exists():
        pytest.skip("no ../shared/data")
    cases = json.loads((golden / file).read_text())
    parses = {}  # {sentence without spaces: its tokens}
    for case in cases:
        tokens = iter(case.get("tokens", []))
        counts = case.get("sentence_lengths", [])
        parts = [[next(tokens) for _ in range(count)] for count in counts]
        for parse in case.get("parsed", parts):
            parses["".join(token["text"] for token in parse)] = parse
    vocab = spacy.blank("en").vocab
    num_parsed = multiprocessing.Value("i")

    def pipe(texts, batch_size):
        for text in texts:
            num_parsed.value += 1  # in any process
            parse = parses[text.replace(" ", "")]  # where each sentence has one full stop
            spaces = [token.get("space", True) for token in parse]
            words, pos, deps, heads = ([token[name] for token in parse]
                                       for name in ("text", "pos", "dep", "head"))
            yield spacy.tokens.Doc(vocab, words, spaces, pos=pos, deps=deps, heads=heads)

    pipeline = SimpleNamespace(vocab=vocab, pipe=pipe)
    monkeypatch.setattr(spacy, "load", lambda *args, **options: pipeline)
    write_captions([case.get("text") or ". ".join(case["sentences"]) for case in cases])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(read, [(FILE, IMAGES, 5, 30)] * 2, chunksize=1)
    samples = read(phrases=30)
    assert num_parsed.value == sum(len(row[0]) for row in samples.samples["sentences"])
    num_equal = 0
    for index, case in enumerate(cases):
        phrases = [text for text, level in samples[0, index][1] if level == "phrase"]
        num_equal += phrases == case["phrases"]
    assert num_equal >= least


def load_copy(name, *edits):
    """A copy of data.py, after edits (old text, new text), as a module."""
    code = Path(data.__file__).read_text(encoding="utf-8")
    for old, new in edits:
        assert old in code
        code = code.replace(old, new)
    spec = importlib.util.spec_from_file_location(name, write_file(Path(f"{name}.py"), code))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("old, new, is_parsed_anew", [
    ("", "", False),
    ("# ---- images", "# A comment. ---- images", False),
    ("HELD_OUT = 1000", "HELD_OUT = 999", False),
    ("if phrase not in", "if phrase in", False),  # phrases are put in order at each draw
    ("split(STOPS[0])", "split('; ')", True),
    ("lemmatizer", "tagger", True),  # of a function whose result is cached
    ('"nearby", ', "", True),  # of a function that this one calls
    ("LENGTHS = (10, 5, 3)", "LENGTHS = (9, 5, 3)", True),
    ("STOPS = ['. ']", "STOPS = ['; ']", True)])
def test_captions_are_parsed_anew_only_if_the_code_that_does_it_changed(old, new, is_parsed_anew):
    constants = [("in (10, 5, 3):", "in LENGTHS:"), ('split(". ")', "split(STOPS[0])"),
                 ("# ---- images", "LENGTHS = (10, 5, 3)\nSTOPS = ['. ']\n# ---- images")]
    before = load_copy("before", *constants)
    after = load_copy("after", *constants, (old, new))
    write_captions(["A red car; a dog. A cat"])
    for module, count in ((before, 1), (after, 2 if is_parsed_anew else 1)):
        samples = module.Captions(FILE, IMAGES, 64, (5, 0))
        assert len(list(Path("cache").rglob("cache-*.arrow"))) == count
    is_split_at_semicolons = samples.samples[0]["sentences"] == [["A red car", "a dog. A cat"]]
    assert is_split_at_semicolons == ("; " in new)


def test_a_draw_has_one_of_its_rows_captions():
    write_captions([["A dog sits.\nA cat cat lies"], ["1", " ", "2"], [" \n"], [], None])
    samples = read(sentences=1)
    assert len(samples) == 2
    draws = [samples[draw // 2, draw % 2][1] for draw in range(40)]
    drawn = {(caption, sentence) for (caption, _), (sentence, _) in draws}
    assert drawn == {(text, text) for text in ("A dog sits", "A cat lies", "1", "2")}


@pytest.mark.parametrize("source, columns", [
    ("a.json", None), ("a.jsonl", None), ("b.json", None), ("a.parquet", None), ("images", None),
    ("hub/name/*.parquet", None), ("hub/name", None), ("a.csv", None), ("tab.csv", None),
    ("a.tsv", None), ("a.tar", None), ("tars/*.tar", None), ("tars", "jpg,txt")])
def test_every_form_of_data_reads_alike(source, columns):
    captions = ["An emoji 🦊. عربي", "NA", "None", 'The "fourth", at last']
    rows = [{"image": f"{i}.jpg", "caption": caption} for i, caption in enumerate(captions)]
    files = [make_image(IMAGES / row["image"], (64, 64), seed) for seed, row in enumerate(rows)]
    write_file(FILE, rows)
    write_file(Path("b.json"), {"annotations": rows})
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_file(Path("a.jsonl"), lines)
    write_file(IMAGES / "metadata.jsonl", lines.replace('"image"', '"file_name"'))
    table = pandas.DataFrame(rows)
    table.to_csv("a.csv", index=False)
    table.to_csv("a.tsv", index=False, sep="\t")
    open_clips = {"index": False, "sep": "\t", "header": ["filepath", "title"]}
    table.to_csv("tab.csv", **open_clips, encoding="utf-8-sig")  # with a byte order mark
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    stored = datasets.Dataset.from_dict({"image": images, "caption": captions})
    stored.to_parquet("a.parquet")
    os.makedirs("hub/name")
    os.mkdir("tars")
    for part in range(2):
        shard = stored.cast_column("image", datasets.Image()).shard(2, part)
        shard.to_parquet(f"hub/name/{part}.parquet")
    for name, part in (("a", rows), ("tars/0", rows[:2]), ("tars/1", rows[2:])):
        with tarfile.open(f"{name}.tar", "w") as archive:
            for row in part:
                archive.add(IMAGES / row["image"], row["image"])
                text = write_file(Path("text"), row["caption"])
                archive.add(text, Path(row["image"]).with_suffix(".txt"))
    has_names = source.endswith(("json", "jsonl", "csv", "tsv"))
    samples = read(source, IMAGES if has_names else "nowhere", columns=columns)
    assert len(samples) == 4
    for index, (row, file) in enumerate(zip(rows, files, strict=True)):
        pixels, queries, read_errors = samples[0, index]
        assert queries[0] == (row["caption"], "caption")
        assert not read_errors
        assert np.array_equal(pixels.permute(1, 2, 0), Image.open(file))


def talk(*answers):
    turns = [{"from": "human", "value": "What?"}]
    return {"conversations": turns + [{"from": "gpt", "value": answer} for answer in answers]}


@pytest.mark.parametrize("name", data.SHAREGPT4V_LISTS)
def test_sv1k_is_never_trained_on(monkeypatch, name):
    monkeypatch.setattr(data, "HELD_OUT", 3)
    rows = [{"image": "a.png", **talk(f"Number {i}", "Another answer")} for i in range(8)]
    path = write_file(Path("lists", name), rows)
    os.symlink(path.absolute(), "link.json")
    for source in (path, path.absolute(), f"images/../{path}", "link.json", "lists/*", "lists"):
        source = f"{source}.json" if source == "lists/*" else source
        assert read_texts(source) == [f"Number {i}" for i in range(3, 8)]
        assert "left out: 3 of the test set SV-1k, 0 of 5" in read(source).summary
    assert [row.texts for row in evaluation.read_sv1k(path)] == [[f"Number {i}"] for i in range(3)]
    write_file(Path("lists/more.json"), rows)
    for source in ("lists/*.json", "lists"):
        with pytest.raises(data.InputError, match="SV-1k, alone"):
            read(source)


@pytest.mark.parametrize("values", [["text", "text"], [[{"a": 1}], [{"a": 2}]], [[["a"]], [["b"]]],
                                    [None, None], [[], ["a"]], ["text", {"a": [1]}]])
def test_a_caption_wins_over_a_conversation_and_other_columns_do_not_matter(values):
    for column in ("phrases", "annotations"):
        write_file(FILE, [ROW | talk("Yes.") | {column: value} for value in values])
        assert read_texts() == ["x", "x"]


def test_a_file_is_not_taken_for_a_glob():
    write_file(Path("pairs[1].jsonl"), ROW)
    write_file(Path("pairs1.jsonl"), ROW | {"caption": "y"})
    assert read_texts("pairs[1].jsonl") == ["x"]
    os.remove("pairs[1].jsonl")
    assert read_texts("pairs[1].jsonl") == ["y"]


def test_files_are_read_as_utf_8_whatever_the_locale_is():
    text = "Ein großer Hund 🦊"
    coco = {"images": [{"id": 0, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 0, "caption": text}]}
    write_file(FILE, json.dumps([ROW | {"caption": text}], ensure_ascii=False))
    write_file(Path("a.csv"), f"image,caption\na.png,{text}\n")
    write_file(Path("captions_val2017.json"), json.dumps(coco, ensure_ascii=False))
    write_file(Path("Urban1k/caption/1.txt"), text)
    for name in ("a.png", "val2017/a.jpg", "Urban1k/image/1.jpg"):
        make_image(Path(name))
    code = ("import eval\nfor name in ('a.json', 'a.csv', 'coco', 'urban1k'):\n"
            "    print(ascii(eval.load_benchmark(name, '.').rows[0].texts))")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    output = subprocess.check_output([sys.executable, "-c", code], env=os.environ | locale | {
        "PYTHONPATH": str(ROOT), "HF_HOME": "home"}, text=True)
    assert output.split("\n") == [ascii([text])] * 4 + [""]


def test_captions_are_prepared_without_sched_getaffinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS and Windows
    write_captions(["x"])
    assert read_texts() == ["x"]


def test_the_fingerprint_tells_other_data():
    captions = [f"Number {i}" for i in range(8)]
    write_captions(captions)
    fingerprint = read().fingerprint
    write_captions(captions, Path("elsewhere/b.json"))
    assert read().fingerprint == read("elsewhere/b.json").fingerprint == fingerprint
    for others in ([*captions[:7], "another"], captions[:4]):
        write_captions(others)
        assert read().fingerprint != fingerprint


def test_odd_images_are_trained_on_right():
    noise = Image.open(make_image(IMAGES / "noise.png", (60, 50)))
    red = noise.getchannel("R")
    indexed = noise.quantize(16)
    inks = [*ImageChops.invert(noise).split(), Image.new("L", noise.size)]
    odd = {  # name: the image, and how it looks
        "cmyk.tif": (Image.merge("CMYK", inks), noise),
        "16 bits.png": (Image.fromarray(np.asarray(red) * np.uint16(257)),
                        Image.merge("RGB", [red] * 3)),
        "☺.gif": (indexed, indexed.convert("RGB")),
        "pixel.png": [noise.crop((0, 0, 1, 1))] * 2,
        "wide.webp": [noise.resize((9999, 9))] * 2}
    for name, (image, _) in odd.items():  # all of them animated: the first picture counts
        more = [image.rotate(180)]
        image.save(IMAGES / name, save_all=True, append_images=more, lossless=True)
    write_file(FILE, [{"photo": name, "text": "x"} for name in odd])
    samples = read(columns="photo,text")
    for index, (name, (_, expected)) in enumerate(odd.items()):
        pixels, _, read_errors = samples[0, index]
        expected = expected.resize((64, 64), Image.Resampling.BILINEAR)
        assert not read_errors
        assert np.array_equal(pixels.permute(1, 2, 0), expected), name


def test_rows_without_an_image_or_a_caption_are_left_out_and_counted(tmp_path):
    make_image(Path("outside.png"))
    make_image(IMAGES / "folder/b.png")
    inside = ["a.png", "folder/../a.png", "folder/b.png", str(tmp_path / "images/a.png")]
    outside = ["gone.png", "gone/a.png", "nul\0.png", "long" * 999, "", ".", "../outside.png",
               "folder/../../outside.png", str(tmp_path / "outside.png"), "/dev/null"]
    rows = [{"image": name, "caption": name} for name in inside + outside]
    write_file(FILE, rows + [ROW | {"caption": caption} for caption in ("", " \n", None)])
    assert read_texts() == inside
    assert read().summary == ("a.json: 4 rows; left out: 0 of the test set SV-1k, 10 of 17 whose "
                              "image is not under images, 3 without a caption")
    make_image(Path("half/folder/b.png"))
    assert read_texts(root="half") == ["folder/b.png"]
    assert "16 of 17 whose image is not under half" in read(root="half").summary
    with pytest.raises(data.InputError, match="none of its 17 images .* --root no, .* a.png"):
        read(root="no")


def test_stored_images_may_be_unreadable_or_names_under_the_root():
    content = make_image(Path("outside.png")).read_bytes()
    images = [{"bytes": content, "path": None}, {"bytes": None, "path": "a.png"},
              {"bytes": b"broken", "path": None}, {"bytes": None, "path": None}, None,
              {"bytes": None, "path": "../outside.png"}, {"bytes": None, "path": "gone.png"}]
    table = datasets.Dataset.from_dict({"image": images, "caption": ["x"] * 7})
    table.to_parquet("a.parquet")
    samples = read("a.parquet")
    is_readable = [not samples[0, index][2] for index in range(7)]
    assert is_readable == [True] * 2 + [False] * 5


def test_unreadable_images_are_replaced_and_named_once(clip_folder, run_and_fail, capfd):
    good = [make_image(IMAGES / f"{seed}.png", seed=seed).name for seed in range(20)]
    broken = [b"", make_image(Path("b.png")).read_bytes()[:-99], b"<html>404</html>"]
    bad = [write_file(IMAGES / f"bad{i}.jpg", broken[i % 3]).name for i in range(11)]
    write_file(FILE, [{"image": name, "caption": name} for name in bad + good])
    samples = read()
    for index, name in enumerate(bad + good):
        pixels, queries, read_errors = samples[0, index]
        assert [error.split(": ")[0] for error in read_errors][:1] == [name] * (name in bad)
        assert queries[0][0] in good  # those of the sample that is taken instead
        assert pixels.max() > 0
    error = run_and_fail(train.main, *FLAGS, clip_folder, "--batch-size", 31)
    assert "11 of 31 draws met 11 broken images" in error
    write_file(FILE, [{"image": name, "caption": name} for name in [bad[0], *good[:8]]])
    write_file(Path("val.json"), [ROW | {"image": "late.png"}])
    flags = [*FLAGS, str(clip_folder), "--max-steps", "2", "--val", "val.json", "--out", "other"]
    assert "images/late.png" in run_and_fail(train.main, *flags)
    assert not Path("other/log.jsonl").exists()  # before the first step
    make_image(IMAGES / "late.png")
    train.main(flags)  # goes on, and draws each image seven times
    assert capfd.readouterr().err.count("unreadable image, another is taken: bad0.jpg: ") == 1
    assert json.loads(Path("other/eval.json").read_text())["val.json"]["T2I R@1"] == 100


@pytest.mark.parametrize("num_images, most", [(4, 10), (2000, 20)])
def test_ten_images_or_one_per_cent_may_be_unreadable(num_images, most):
    pixels = torch.zeros(num_images, 3, 1, 1)
    batch = data.Batch(pixels, models.pack([[0, 1]]), *torch.zeros(3, 1), ["a.png: broken"] * most)
    assert len(list(train.device_batches([batch], "cpu"))) == 1
    batch.read_errors.append("b.png: broken")
    with pytest.raises(data.InputError, match=f"^{most + 1} of {num_images} draws met 2 broken"):
        list(train.device_batches([batch], "cpu"))


@pytest.mark.parametrize("content, complaint, flags", [
    ([{"photo": "a.png", "caption": "x"}], "a.json has the columns photo, caption, none of", ""),
    ([ROW], "columns image, caption, none of which are photo and text", "--columns photo,text"),
    ([ROW], "none of which are image", "--columns image"),
    ([ROW | {"image": "http://x.org/a.png"}], "root images, for instance http://x.org/a.png", ""),
    ([ROW | {"image": ["a.png"]}], "a.json cannot be read: ", ""),
    ([ROW | {"caption": 7}], "captions must be strings or lists of strings, not 7", ""),
    ([ROW, ROW | {"caption": 7}], "strings or lists of strings", ""),
    ([], "a.json cannot be read", ""),
    ("", "a.json cannot be read", ""),
    ('[{"image": "a.png", "capt', "a.json cannot be read", ""),
    ([ROW | {"caption": " \n"}] * 9, "the data has 0 rows", ""),
    ([ROW] * 3, "the data has 3 rows, too few for a batch of --batch-size 4 x 1", ""),
    ([ROW] * 2100, "python -m spacy download en_core_web_sm`; or pass --phrases 0", "--phrases 9"),
    ([ROW], "no/where cannot be read", "--data no/where"),
    ([ROW], "nowhere: no file (.json, ", "--data nowhere")])
def test_impossible_data_ends_in_one_line(clip_folder, run_and_fail, content, complaint, flags):
    write_file(FILE, content)
    line = run_and_fail(train.main, *FLAGS, clip_folder, *flags.split())
    assert complaint in line
    assert not line.endswith(":")  # a reason is given
    assert not Path("run").exists()
