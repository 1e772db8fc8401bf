"""Images and captions on disk: captions to queries, every form of data, odd and bad input."""

import gzip
import json
import multiprocessing
import sys
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, picture, write
from PIL import Image, ImageChops
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import data
import eval as evaluation
import model as models
import train

SHARED = ROOT.parent / "shared/data"
NAMES, IMAGES = Path("a.json"), Path("images")  # in the working folder
ROW = {"image": "a.png", "caption": "x"}
FLAGS = "--data a.json --root images --batch-size 4 --phrases 0 --workers 0 --out run --model".split()

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder, an empty cache of `datasets`, and no model of spaCy; images are not cropped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(data.RandomResizedCrop, "get_params", lambda image, *_: (0, 0, *image.size[::-1]))
    monkeypatch.setitem(sys.modules, "en_core_web_sm", None)
    data.parser.cache_clear()
    picture(IMAGES / "a.png")

def read(source, root=IMAGES, phrases=0, sentences=5, columns=None):
    return data.Captions(source, root, 64, (sentences, phrases), columns=columns)

def test_sentences_golden(golden):
    for case in json.loads((golden / "sentences.json").read_text()):
        assert data.clean(case["caption"]) == case["clean"]
        assert data.split_sentences(case["clean"]) == case["sentences"]

@pytest.mark.parametrize("file, least", [("phrases.json", 7), (SHARED / "phrases_trained.json", 44)])
def test_phrases_are_the_authors_and_parsed_once_by_all_processes(golden, monkeypatch, file, least):
    if not (golden / file).exists():
        pytest.skip("no ../shared/data")
    spacy, cases = pytest.importorskip("spacy"), json.loads((golden / file).read_text())
    vocab, log, parses = spacy.blank("en").vocab, write(Path("log"), ""), {}
    for case in cases:
        tokens = iter(case.get("tokens", ()))
        parts = [[next(tokens) for _ in range(length)] for length in case.get("sentence_lengths", ())]
        parses |= {"".join(token["text"] for token in parse): parse for parse in case.get("parsed", parts)}

    def pipe(texts, batch_size):
        for text in texts:
            log.write_text(log.read_text() + text + "\n")
            parse = parses[text.replace(" ", "")]  # which says that a sentence has a full stop, and one
            words, *columns = ([token[name] for token in parse] for name in ("text", "pos", "dep", "head"))
            spaces = [token.get("space", True) for token in parse]
            yield spacy.tokens.Doc(vocab, words, spaces, **dict(zip(("pos", "deps", "heads"), columns)))
    monkeypatch.setattr(spacy, "load", Mock(return_value=Mock(vocab=vocab, pipe=pipe)))
    write(NAMES, [ROW | {"caption": case.get("text") or ". ".join(case["sentences"])} for case in cases])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(read, [(NAMES, IMAGES, 30)] * 2, chunksize=1)
    samples = read(NAMES, phrases=30)
    parsed = log.read_text()
    assert parsed.count("\n") == sum(len(captions[0]) for captions in samples.captions["sentences"])
    same = sum([text for text, level in samples[0, index][1] if level == "phrase"] == case["phrases"]
               for index, case in enumerate(cases))
    assert same >= least, f"{same} of {len(cases)} lists are equal"
    monkeypatch.setattr(data, "__file__", write(Path("data.py"), Path(data.__file__).read_text() + "#"))
    read(NAMES, phrases=30)
    assert log.read_text() == parsed * 2  # other code parses anew

@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_curly_quotes_are_straightened_before_the_real_bpe():
    lines = gzip.open(SHARED / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8").read().split("\n")
    merges, letters = [tuple(line.split()) for line in lines[1:48895]], [*bytes_to_unicode().values()]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    vocab = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    texts = ["a diagram", "the dog’s “ball”", "the dog's \"ball\""]
    diagram, curly, straight = data.tokenize(CLIPTokenizer(vocab=vocab, merges=merges), texts)
    assert diagram == [49406, 320, 22697, 49407] and curly == straight  # as in CLIP's README

@pytest.mark.parametrize("source", [
    "a.json", "a.jsonl", "b.json", "a.parquet", "images", "hub/name/*.parquet", "hub/name"])
def test_every_form_of_data_reads_alike(source):
    rows = [{"image": f"{i}.jpg", "caption": f"Number {i}, an emoji 🦊. عربي"} for i in range(4)]
    files = [picture(IMAGES / row["image"], (64, 64), seed) for seed, row in enumerate(rows)]
    inside = [row | {"image": {"bytes": file.read_bytes()}} for row, file in zip(rows, files)]
    table = datasets.Dataset.from_list(inside)
    table.to_parquet("a.parquet")
    write(NAMES, rows)
    write(Path("b.json"), {"annotations": rows})
    write(Path("a.jsonl"), lines := "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    write(IMAGES / "metadata.jsonl", lines.replace('"image"', '"file_name"'))
    Path("hub/name").mkdir(parents=True)
    for part in range(2):
        table.cast_column("image", datasets.Image()).shard(2, part).to_parquet(f"hub/name/{part}.parquet")
    samples = read(source, IMAGES if "json" in source else "nowhere")
    assert len(samples) == 4
    for index, (row, file) in enumerate(zip(rows, files)):
        pixels, queries, unreadable = samples[0, index]
        assert queries[0] == (row["caption"], "caption") and not unreadable
        assert np.array_equal(pixels.permute(1, 2, 0), Image.open(file))

def test_sv1k_is_never_trained_on(monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT", 3)
    answers = [[("human", "What?"), ("gpt", f"Number {i}"), ("gpt", "Another answer")] for i in range(8)]
    talks = [[{"from": name, "value": text} for name, text in answer] for answer in answers]
    rows = [{"image": "a.png", "conversations": talk} for talk in talks]
    samples = read(source := write(IMAGES / data.SHAREGPT4V, rows))
    assert [samples[0, i][1][0][0] for i in range(len(samples))] == [f"Number {i}" for i in range(3, 8)]
    assert [text for _, [text] in evaluation.sv1k(source)] == [f"Number {i}" for i in range(3)]

def test_a_draw_has_one_of_its_rows_captions_and_the_phrases_that_the_row_brings():
    rows = (["A dog sits.\nA cat cat lies"], ["dog", "cat"]), (["1", " ", "2"], []), ([" \n"], []), ([], [])
    write(NAMES, [ROW | {"caption": captions, "phrases": phrases} for captions, phrases in rows])
    samples = read(NAMES, sentences=1, phrases=9)
    assert len(samples) == 2  # without those that have no caption
    drawn = {tuple(text for text, _ in samples[draw // 2, draw % 2][1][1:]) for draw in range(40)}
    assert drawn == {("A dog sits", "dog", "cat"), ("A cat lies", "dog", "cat"), ("1",), ("2",)}

def test_odd_images_are_trained_on_right():
    noise = Image.open(picture(IMAGES / "noise.png", (60, 50)))
    red, indexed = noise.getchannel("R"), noise.quantize(16)
    inks = [*ImageChops.invert(noise).split(), Image.new("L", noise.size)]
    odd = {  # name: the image, and how it looks
        "cmyk.tif": (Image.merge("CMYK", inks), noise),
        "16 bits.png": (Image.fromarray(np.asarray(red) * np.uint16(257)), Image.merge("RGB", [red] * 3)),
        "☺.gif": (indexed, indexed.convert("RGB")), "pixel.png": [noise.crop((0, 0, 1, 1))] * 2,
        "wide.webp": [noise.resize((9999, 9))] * 2}
    for name, (image, _) in odd.items():  # all of them animated: the first picture counts
        image.save(IMAGES / name, save_all=True, append_images=[image.rotate(180)], lossless=True)
    write(NAMES, [{"photo": name, "text": "x"} for name in odd])
    samples = read(NAMES, columns="photo,text")
    for index, (name, (_, right)) in enumerate(odd.items()):
        pixels, _, unreadable = samples[0, index]
        right = right.resize((64, 64), Image.Resampling.BILINEAR)
        assert not unreadable and np.array_equal(pixels.permute(1, 2, 0), right), name

def test_unreadable_images_are_replaced_and_named_once(tmp_path, clip, refused, capfd):
    good = [picture(IMAGES / f"{seed}.png", seed=seed).name for seed in range(20)]
    whole = picture(Path("outside.png")).read_bytes()  # it is there, but not under the root
    for name, content in ("zero.jpg", b""), ("cut.png", whole[:-99]), ("page.jpg", "<html>404</html>"):
        write(IMAGES / name, content)
    bad = ["zero.jpg", "cut.png", "page.jpg", "gone.jpg", "nul\0.png", "long" * 999, ".", "../outside.png",
           "a/../../outside.png", str(tmp_path / "outside.png"), "/dev/null"]
    write(NAMES, [{"image": name, "caption": name} for name in bad + good])
    samples = read(NAMES)
    for index, name in enumerate(bad + good):
        pixels, queries, unreadable = samples[0, index]
        assert [one.split(": ")[0] for one in unreadable][:1] == [name] * (name in bad)
        assert queries[0][0] in good and pixels.max() > 0  # those of a sample that is taken instead
    inside = [{"bytes": content, "path": None} for content in (b"broken", None, whole)]
    table = datasets.Dataset.from_list([ROW | {"image": image} for image in [*inside, None]])
    table.cast_column("image", datasets.Image()).to_parquet("a.parquet")
    assert [len(read("a.parquet")[0, index][2]) > 0 for index in range(4)] == [True, True, False, True]
    error = refused(train.main, *FLAGS, clip, "--batch-size", len(samples))
    assert "of the 31 images of this process were unreadable, more than 1 %" in error and "--root" in error
    write(NAMES, [{"image": name, "caption": name} for name in ["gone.jpg", *good[:8]]])
    write(Path("val.json"), [ROW | {"image": "late.png"}])
    flags = [*FLAGS, str(clip), "--max-steps", "2", "--val", "val.json", "--out", "other"]
    assert "late.png under images: unreadable image" in refused(train.main, *flags)
    assert not Path("other/log.jsonl").exists()  # before the first step
    picture(IMAGES / "late.png")
    train.main(flags)  # goes on, and draws each image seven times
    assert capfd.readouterr().err.count("another sample is taken: gone.jpg: ") == 1
    assert json.loads(Path("other/eval.json").read_text())["val.json"]["T2I R@1"] == 100
    batch = data.Batch(torch.zeros(2000, 3, 1, 1), models.pack([[0, 1]]), *torch.zeros(3, 1), ["a"] * 20)
    assert len(list(train.device_batches([batch], "cpu"))) == 1  # one per cent may be unreadable
    with pytest.raises(data.InputError):
        list(train.device_batches([batch._replace(unreadable=batch.unreadable + ["b"])], "cpu"))

@pytest.mark.parametrize("content, complaint, flags", [
    ([{"photo": "a.png", "caption": "x"}], "a.json cannot be read: no column image, but photo, caption", ""),
    ([ROW], "no column photo or text, but image, caption", "--columns photo,text"),
    ([ROW], "no column , but image, caption", "--columns image"),
    ([ROW | {"image": "https://x.org/a.png"}], "'image' must hold images, or names of files, no http", ""),
    ([ROW | {"image": ["a.png"]}], "a.json cannot be read: Cannot", ""),
    ([ROW | {"caption": 7}], "a.json cannot be read: captions must be texts", ""),
    ([ROW, ROW | {"caption": 7}], "texts, or lists of texts", ""),
    *((broken, "a.json cannot be read", "") for broken in ([], "", '[{"image": "a.png", "capt')),
    ([ROW | {"caption": " \n"}] * 9, "only 0 samples", ""),
    ([ROW] * 3, "--batch-size 4 x 1: only 3 samples", ""),
    ([ROW] * 2100, "python -m spacy download en_core_web_sm`, or pass --phrases 0", "--phrases 9"),
    ([ROW], "no/where cannot be read", "--data no/where"),
    ([ROW], "nowhere: no .json, .jsonl or .parquet file, no folder", "--data nowhere")])
def test_impossible_data_ends_in_one_line(clip, refused, content, complaint, flags):
    write(NAMES, content)
    line = refused(train.main, *FLAGS, clip, *flags.split())
    assert complaint in line and not line.endswith(":")  # a reason is given
    assert not Path("run").exists()
