"""Images and captions on disk: captions to queries, every form of data, odd and bad input."""

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
from conftest import ROOT, SHARED, make_image, write_file
from PIL import Image

import data
import eval as evaluation
import model as models
import train

FILE = Path("a.json")  # in the working folder, as IMAGES
IMAGES = Path("images")
ROW = {"image": "a.png", "caption": "x"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with an image, no cache of `datasets`, no model of spaCy, and no crops."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(data.RandomResizedCrop, "get_params",
                        lambda _, image, *args: (0, 0, *image.size[::-1]))
    monkeypatch.setitem(sys.modules, "en_core_web_sm", None)
    data.load_spacy.cache_clear()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS and Windows
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
    nlp = spacy.blank("en")
    docs = {}  # {sentence without spaces: how it is parsed}
    for case in cases:
        tokens = iter(case.get("tokens", []))
        for parse in case.get("parsed") or [list(itertools.islice(tokens, count))
                                            for count in case["sentence_lengths"]]:
            words, pos, deps, heads = ([token[name] for token in parse]
                                       for name in ("text", "pos", "dep", "head"))
            spaces = [token.get("space", True) for token in parse]
            docs["".join(words)] = spacy.tokens.Doc(
                nlp.vocab, words, spaces, pos=pos, deps=deps, heads=heads)
    num_parsed = multiprocessing.Value("i")

    def pipe(texts, batch_size):
        for text in texts:
            num_parsed.value += 1  # in any process
            yield docs[text.replace(" ", "")]  # where each sentence has one full stop

    nlp.pipe = pipe
    monkeypatch.setattr(spacy, "load", lambda *args, **options: nlp)
    write_captions([case.get("text") or ". ".join(case["sentences"]) for case in cases])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(read, [(FILE, IMAGES, 9, 30)] * 2, chunksize=1)
    samples = read(sentences=9, phrases=30)
    assert num_parsed.value == sum(len(row[0]) for row in samples.prepared["sentences"])
    phrases = [[text for text, level in samples[0, index][1] if level == "phrase"]
               for index in range(len(cases))]
    num_equal = sum(phrases[i] == case["phrases"] for i, case in enumerate(cases))
    assert num_equal >= least


@pytest.mark.parametrize("name, value, num_parsed", [
    ("NUM_HELD_OUT", 999, 1),
    ("order_phrases", write_captions, 1),  # phrases are put in order at each draw
    ("build_phrase_matchers", write_captions, 2),  # called by a function whose result is cached
    ("words", ["as if a constant"], 2)])  # this name occurs in the code
def test_captions_are_parsed_anew_only_if_its_code_changed(monkeypatch, name, value, num_parsed):
    write_captions(["A red car; a dog. A cat"])
    read()
    monkeypatch.setattr(data, name, value, raising=False)
    read()
    assert len(list(Path("cache").rglob("cache-*.arrow"))) == num_parsed


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
    names = ["filepath", "title"]  # open_clip's; with a byte order mark
    table.to_csv("tab.csv", index=False, sep="\t", header=names, encoding="utf-8-sig")
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
    for index, row, file in zip(range(len(samples)), rows, files, strict=True):
        pixels, queries, _ = samples[0, index]
        assert queries[0] == (row["caption"], "caption")
        assert np.array_equal(pixels.permute(1, 2, 0), Image.open(file))


def talk(*answers):
    turns = [{"from": "human", "value": "What?"}]
    return {"conversations": turns + [{"from": "gpt", "value": answer} for answer in answers]}


@pytest.mark.parametrize("name", data.SHAREGPT4V_LISTS)
def test_sv1k_is_never_trained_on(monkeypatch, name):
    monkeypatch.setattr(data, "NUM_HELD_OUT", 3)
    rows = [{"image": "a.png", **talk(f"Number {i}", "Another answer")} for i in range(8)]
    path = write_file(Path("lists", name), rows)
    os.symlink(path.absolute(), "a.json")
    for source in (path, path.absolute(), f"images/../{path}", "a.json", "lists/*.json", "lists"):
        assert read_texts(source) == [f"Number {i}" for i in range(3, 8)]
        assert "left out: 3 of the test set SV-1k, 0 (of 5)" in read(source).summary
    assert [row.texts for row in evaluation.read_sv1k(path)] == [[f"Number {i}"] for i in range(3)]
    write_file(Path("lists/more.json"), rows)
    with pytest.raises(data.InputError, match="keep only one list of ShareGPT4V"):
        read("lists")
    for other in data.SHAREGPT4V_LISTS:
        write_file(IMAGES / other, rows)
    with pytest.raises(data.InputError, match="keep only one list of ShareGPT4V"):
        read(path)


@pytest.mark.parametrize("values", [["text", "text"], [[{"a": 1}], [{"a": 2}]], [[["a"]], [["b"]]],
                                    [None, None], [[], ["a"]], ["text", {"a": [1]}]])
def test_a_caption_wins_over_a_conversation_and_other_columns_do_not_matter(values):
    write_file(FILE, [ROW | talk("Yes.") | {"phrases": value, "annotations": value}
                      for value in values])
    assert read_texts() == ["x", "x"]


def test_a_file_is_not_taken_for_a_glob_and_other_captions_have_another_fingerprint():
    write_file(Path("pairs[1].jsonl"), ROW)
    write_file(Path("pairs1.jsonl"), ROW | {"caption": "y"})
    assert read_texts("pairs[1].jsonl") == ["x"]
    fingerprint = read("pairs[1].jsonl").fingerprint
    os.remove("pairs[1].jsonl")
    assert read_texts("pairs[1].jsonl") == ["y"]
    assert read("pairs[1].jsonl").fingerprint != fingerprint


def test_files_are_read_as_utf_8_whatever_the_locale_is():
    coco = {"images": [{"id": 0, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 0, "caption": "🦊"}]}
    write_file(Path("captions_val2017.json"), json.dumps(coco, ensure_ascii=False))
    write_file(Path("Urban1k/caption/1.txt"), "🦊")
    make_image(Path("val2017/a.jpg"))
    make_image(Path("Urban1k/image/1.jpg"))
    code = ("import eval\nfor name in ('coco', 'urban1k'):\n"
            "    print(ascii(eval.load_benchmark(name, '.').rows[0].texts))")
    environ = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environ = os.environ | environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.check_output([sys.executable, "-c", code], env=environ, text=True)
    assert output == f"{ascii(['🦊'])}\n" * 2


def test_rows_without_an_image_or_a_caption_are_left_out_and_counted(tmp_path):
    make_image(Path("outside.png"))
    make_image(IMAGES / "folder/b.png")
    inside = ["a.png", "folder/../a.png", "folder/b.png", str(tmp_path / "images/a.png")]
    outside = ["gone.png", "gone/a.png", "nul\0.png", "long" * 999, "", ".", "../outside.png",
               "folder/../../outside.png", str(tmp_path / "outside.png"), "/dev/null"]
    rows = [{"image": name, "caption": name} for name in inside + outside]
    write_file(FILE, rows + [ROW | {"caption": caption} for caption in ("", " \n", None)])
    assert read_texts() == inside
    assert read().summary == ("a.json: 4 rows; left out: 0 of the test set SV-1k, 10 (of 17) "
                              "with no image under images, 3 without a caption")
    make_image(Path("half/folder/b.png"))
    assert read_texts(root="half") == ["folder/b.png"]
    with pytest.raises(data.InputError, match="none of its 17 images .* --root no, .* a.png"):
        read(root="no")


def test_unreadable_images_are_replaced():
    content = make_image(Path("outside.png")).read_bytes()
    write_file(IMAGES / "cut.png", content[:-99])
    images = [{"bytes": content, "path": None}, {"bytes": None, "path": "a.png"}, None,
              {"bytes": b"<html>404</html>", "path": "b.png"}, {"bytes": None, "path": None}]
    images += [{"bytes": None, "path": name} for name in ("cut.png", "../outside.png", "gone.png")]
    table = datasets.Dataset.from_dict({"image": images, "caption": ["good"] * 2 + ["bad"] * 6})
    table.to_parquet("a.parquet")
    samples = read("a.parquet")
    names = []
    for index in range(8):
        pixels, queries, read_errors = samples[0, index]
        names += [error.split(": ")[0] for error in read_errors]
        assert queries[0][0] == "good"  # those of the sample that is taken instead
        assert pixels.max() > 0
    assert names == ["None", "b.png", "None", "cut.png", "../outside.png", "gone.png"]
    task = evaluation.load_benchmark("a.parquet", IMAGES)
    assert task.images[1] == str(Path("images/a.png").absolute())


@pytest.mark.parametrize("num_images, most", [(4, 10), (2000, 20)])
def test_ten_images_or_one_per_cent_may_be_unreadable_and_are_named_once(num_images, most, capfd):
    pixels = torch.zeros(num_images // 2, 3, 1, 1)
    errors = ["a.png: broken"] * (most // 2)
    batch = data.Batch(pixels, models.pack([[0, 1]]), *torch.zeros(3, 1), errors)
    assert len(list(train.device_batches([batch] * 2, "cpu"))) == 2
    assert capfd.readouterr().err == "unreadable image, replaced: a.png: broken\n"
    worse = batch._replace(read_errors=[*errors, "b.png: broken"])
    with pytest.raises(data.InputError, match=f"^{most + 1} of {num_images} draws hit 2 broken"):
        list(train.device_batches([batch, worse], "cpu"))


@pytest.mark.parametrize("content, complaint, flags", [
    ([{"photo": "a.png", "caption": "x"}], "a.json has the columns photo, caption, but not", ""),
    ([ROW | {"image": ["a.png"]}], "a.json cannot be read: ", ""),
    ([ROW, ROW | {"caption": 7}], "captions must be strings or lists of strings, not 7", ""),
    ('[{"image": "a.png", "capt', "a.json cannot be read: ", ""),
    ([ROW | {"caption": " \n"}] * 9, "the data has 0 rows, too few for a batch of", ""),
    ([ROW] * 2100, "python -m spacy download en_core_web_sm`; or pass --phrases 0", "--phrases 9"),
    ([ROW], "no/where cannot be read: ", "--data no/where")])
def test_impossible_data_ends_in_one_line(clip_folder, run_and_fail, content, complaint, flags):
    write_file(FILE, content)
    argv = f"--data a.json --root images --phrases 0 --workers 0 --out run {flags} --model"
    assert complaint in run_and_fail(train.main, *argv.split(), clip_folder)
    assert not Path("run").exists()
