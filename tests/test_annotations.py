"""Annotation files on disk to samples: ShareGPT4V's format, any JSON of images and captions, broken images."""

import json
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import data
import train

ROOT = Path(data.__file__).parent
PIPELINE = '''
import json, spacy
from spacy.language import Language
from spacy.tokens import Doc

GOLDEN = {}
for case in json.load(open(%r)):
    tokens = iter(case["tokens"])
    for length in case["sentence_lengths"]:
        part = [next(tokens) for _ in range(length)]
        GOLDEN[tuple(t["text"] for t in part)] = part

@Language.component("annotate")
def annotate(doc):
    words = [token.text for token in doc]
    part = GOLDEN.get(tuple(words)) or [dict(pos="NOUN", dep="ROOT", head=0) for _ in words]
    return Doc(doc.vocab, words=words, pos=[t["pos"] for t in part], deps=[t["dep"] for t in part], heads=[t["head"] for t in part])

def load(**options):
    open(%r, "a").write("loaded\\n")
    nlp = spacy.blank("en")
    nlp.add_pipe("annotate")
    return nlp
'''


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # of processes that a test starts


@pytest.fixture
def pipeline(tmp_path, golden, monkeypatch):
    """A stand-in for spaCy's en_core_web_sm, which says what the golden parses say; the file that its loads are noted in."""
    pytest.importorskip("spacy")
    home = tmp_path / "site"
    for name in ("en_core_web_sm", "en_core_web_sm-3.0.dist-info"):
        (home / name).mkdir(parents=True)
    (home / "en_core_web_sm/__init__.py").write_text(PIPELINE % (str(golden / "phrases.json"), str(tmp_path / "loads")))
    (home / "en_core_web_sm-3.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: en_core_web_sm\nVersion: 3.0\n")
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setenv("PYTHONPATH", str(home))
    data.parser.cache_clear()
    yield tmp_path / "loads"
    data.parser.cache_clear()
    sys.modules.pop("en_core_web_sm", None)


@pytest.fixture
def no_pipeline():
    spacy = pytest.importorskip("spacy")
    if spacy.util.is_package("en_core_web_sm"):
        pytest.skip("spaCy's English model is installed")


def picture(path, size=(90, 70), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (9, 7), random.Random(seed).randbytes(189)).resize(size).save(path)


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def captions(path, root=".", sentences=5, phrases=0, **more):
    return data.Captions(path, root, 32, sentences, phrases, **more)


def refused(capsys, act):
    with pytest.raises(SystemExit) as stop:
        act()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def test_list_and_lines_read_alike(tmp_path):
    rows = [{"image": f"{i}.jpg", "caption": f"emoji 🦊, عربي and {i}"} for i in range(3)]
    text = [json.dumps(rows), json.dumps(rows, indent=1, ensure_ascii=False), "\n".join(map(json.dumps, rows)),
            "﻿" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\r\n"]  # a BOM, Windows line ends
    for number, one in enumerate(text):
        (tmp_path / "rows").write_bytes(one.encode("utf-8"))
        assert [row for _, row in data.rows(tmp_path / "rows")] == rows, number


def test_a_file_larger_than_the_buffer(tmp_path):
    rows = [{"image": "x.jpg", "caption": "é" * (i % 5000)} for i in range(1500)]  # 7 MB of \u00e9
    assert [row for _, row in data.rows(write(tmp_path / "rows.json", rows))] == rows


def test_sv1k_is_never_trained_on(tmp_path):
    talk = lambda i: [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"Caption number {i}."}]
    path = write(tmp_path / "share.json", [{"id": i, "image": f"{i}.jpg", "conversations": talk(i)} for i in range(1010)])
    trained = {row["image"] for row in captions(path).rows}
    tested = {row["image"] for row in data.annotations(path, held_out=True)}
    assert trained == {f"{i}.jpg" for i in range(1000, 1010)} and len(tested) == 1000 and not trained & tested


def test_a_captions_file_has_nothing_held_out_and_brings_its_phrases(tmp_path):
    rows = [{"image": "a.jpg", "caption": "A red dog sits.\nA cat cat sleeps", "phrases": ["red dog", "cat", "animals at home"]},
            {"image": "b.jpg", "caption": "  "}, {"image": "c.jpg", "caption": "One", "phrases": []}]
    a, c = captions(write(tmp_path / "a.json", rows), phrases=9).rows  # the empty caption is left out
    assert a["sentences"] == ["A red dog sits", "A cat sleeps"]
    assert a["phrases"] == [[["red dog", "animals at home"], [], []], [["cat", "animals at home"], [], []]]
    assert c["phrases"] == [[[], [], []]]


def test_phrases_are_parsed_once_and_kept(tmp_path, golden, pipeline):
    cases = json.loads((golden / "phrases.json").read_text())
    sentences, rows = [], []
    for case in cases:
        words = iter(token["text"] for token in case["tokens"])
        sentences.append([" ".join(next(words) for _ in range(length)) for length in case["sentence_lengths"]])
    rows = [{"image": f"{i}.jpg", "caption": ". ".join(s)} for i, s in enumerate(sentences)]
    path = write(tmp_path / "a.json", rows)
    prepared = captions(path, phrases=30).rows
    assert pipeline.read_text() == "loaded\n"
    for row, case in zip(prepared, cases):
        expected = case["phrases"]
        if [len(s.split()) for s in row["sentences"]] == case["sentence_lengths"]:
            assert data.order_phrases(row["phrases"]) == expected
    assert any([len(s.split()) for s in row["sentences"]] == case["sentence_lengths"] and case["phrases"] for row, case in zip(prepared, cases))
    data.parser.cache_clear()
    assert list(captions(path, phrases=30).rows) == list(prepared)
    assert pipeline.read_text() == "loaded\n"  # the second start parsed nothing
    path.write_text(path.read_text().replace("0.jpg", "9.jpg"))
    assert captions(path, phrases=30).rows[0]["image"] == "9.jpg"  # another file is another cache


def test_two_processes_work_once(tmp_path, pipeline):
    path = write(tmp_path / "a.json", [{"image": "a.jpg", "caption": "A dog. " * 3 + str(i)} for i in range(300)])
    code = f"import data; print(len(data.prepare({str(path)!r}, True)))"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.communicate()[0].split()[-1] for one in both] == ["300", "300"]
    assert pipeline.read_text() == "loaded\n"


def test_without_spacy_one_line_says_what_to_install(tmp_path, capsys, no_pipeline):
    path = write(tmp_path / "a.json", [{"image": "a.jpg", "caption": "A dog."}])
    error = refused(capsys, lambda: captions(path, phrases=30))
    assert "python -m spacy download en_core_web_sm" in error and "--phrases 0" in error
    assert len(captions(path)) == 1
    capsys.readouterr()
    rows = [{"image": "a.jpg", "caption": "A dog.", "phrases": ["dog"]}, *[{"image": "a.jpg", "caption": "A dog."}] * 2100]
    assert refused(capsys, lambda: captions(write(path, rows), phrases=30)) == error  # here too, where several processes would parse


def test_a_draw_has_the_phrases_of_its_sentences_by_kind(tmp_path):
    rows = datasets.Dataset.from_list([{"image": "a.jpg", "sentences": [f"s{i}" for i in range(7)],
                                        "phrases": [[[f"n{i}", "the image"], [f"a{i}"], ["next to"]] for i in range(7)]}])
    picture(tmp_path / "a.jpg")
    samples = captions(write(tmp_path / "x.json", [{"image": "a.jpg", "caption": "x"}]), tmp_path, seed=3)
    samples.rows, samples.phrases = rows, 30
    for epoch in range(3):
        pixels, texts, phrases, unreadable = samples[(epoch, 0)]
        drawn = [text[1:] for text in texts[1:]]
        assert texts[0] == ". ".join(texts[1:]) and len(set(drawn)) == 5
        assert phrases == [f"n{i}" for i in drawn] + [f"a{i}" for i in drawn] + ["next to"]
    assert samples[(0, 0)][1] != samples[(1, 0)][1]
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(samples[(1, 0)], samples[(1, 0)]))
    samples.captions_only = True
    assert len(samples[(0, 0)][1]) == 1 and samples[(0, 0)][2] == []


def test_a_caption_of_a_thousand_words_and_a_long_phrase_are_cut(tmp_path, tokenizer):
    picture(tmp_path / "a.jpg")
    rng = random.Random(0)
    words = lambda count: " ".join(rng.choice(list(pool)) for _ in range(count // 2) for pool in (data.COLOURS, data.SHAPES))
    rows = [{"image": "a.jpg", "caption": ". ".join(words(100) for _ in range(10)), "phrases": [words(50)]}]
    samples = captions(write(tmp_path / "a.json", rows), tmp_path, phrases=3)
    _, tokens, lengths, owner, _ = data.collate([samples[(0, 0)]], tokenizer)
    assert lengths.tolist() == [248, *[102] * 5, 30] and owner.tolist() == [0] * 7
    assert all(text[-1] == tokenizer.eos_token_id for text in tokens.split(lengths.tolist()))


@pytest.mark.parametrize("name, most", [("a.png", .001), ("a.jpg", .03)])
def test_images_are_cropped_as_torchvision_does(tmp_path, name, most):
    noise = Image.frombytes("RGB", (12, 8), random.Random(0).randbytes(288)).resize((1200, 800), Image.Resampling.BICUBIC)
    noise.save(tmp_path / name, quality=95)
    for seed in range(5):
        with Image.open(tmp_path / name) as image:
            ours = data.random_crop(image, 64, random.Random(seed))
            assert image.size == ((150, 100) if name == "a.jpg" else (1200, 800))  # a JPEG is decoded at an eighth, which has 64 pixels across the crop
        with torch.random.fork_rng():
            torch.manual_seed(random.Random(seed).getrandbits(63))
            theirs = RandomResizedCrop(64, (0.5, 1))(Image.open(tmp_path / name))
        assert (ours - data.to_pixels(theirs, 64)).abs().mean() < most


ROWS = {  # rows that end the program, and what the one line names
    "no image": ([{"caption": "x"}], ["row 1", "'image'"]),
    "no caption": ([{"image": "a.jpg", "caption": "x"}, {"image": "a.jpg", "captions": "x"}], ["row 2", "'caption'"]),
    "a caption that is no text": ([{"image": "a.jpg", "caption": 7}], ["row 1", "'caption'", "7"]),
    "an image that is no text": ([{"image": None, "caption": "x"}], ["row 1", "'image'"]),
    "phrases that are no list": ([{"image": "a.jpg", "caption": "x", "phrases": "red dog"}], ["row 1", "'phrases'"]),
    "no rows": ([], ["no rows"]),
    "only held-out rows": ([{"image": "a.jpg", "conversations": [{"from": "gpt", "value": "x"}]}], ["no row to train on"]),
    "no answer": ([{"image": "a.jpg", "conversations": [{"from": "human", "value": "x"}]}] * 1001, ["row 1001", "'caption'"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_end_in_one_line(tmp_path, capsys, case):
    rows, names = ROWS[case]
    path = write(tmp_path / "a.json", rows)
    error = refused(capsys, lambda: captions(path))
    assert str(path) in error and all(name in error for name in names), error


def test_training_on_a_file_of_captions(tmp_path, clip, capsys):
    rows = [{"image": f"images/{i}.jpg", "caption": f"A red star {i}. A blue circle. A green cross", "phrases": ["red star"]} for i in range(40)]
    for i in range(40):
        picture(tmp_path / f"images/{i}.jpg", seed=i)
    (tmp_path / "images/7.jpg").write_bytes(b"broken")
    write(tmp_path / "a.json", rows)
    flags = f"--data {tmp_path / 'a.json'} --root {tmp_path} --model {clip} --batch-size 8 --accum 1 --workers 2 --max-steps 12 --out {tmp_path / 'run'}"
    train.main(flags.split())
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "eval" not in line]
    assert lines[-1]["step"] == 12 and lines[-1]["unreadable"] >= 2
    said = capsys.readouterr().err
    assert said.count(f"another sample is taken: {tmp_path}/images/7.jpg") == 1  # named once
    assert said.count("note: coco is not measured: there is no captions_val2017.json") == 1


def test_a_run_with_too_many_unreadable_images_stops(tmp_path, clip, capsys):
    rows = [{"image": f"{i}.jpg", "caption": f"A red star {i}"} for i in range(64)]
    picture(tmp_path / "1.jpg")
    write(tmp_path / "a.json", rows)
    with pytest.raises(SystemExit) as stop:
        train.main(f"--data {tmp_path / 'a.json'} --root {tmp_path} --model {clip} --batch-size 8 --phrases 0 --workers 0 --max-steps 5 --out {tmp_path / 'run'}".split())
    assert stop.value.code == 2 and "more than 1 %" in capsys.readouterr().err


def test_more_images_a_step_than_samples(tmp_path, clip, capsys):
    picture(tmp_path / "1.jpg")
    write(tmp_path / "a.json", [{"image": "1.jpg", "caption": "A red star"}])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(f"--data {tmp_path / 'a.json'} --root {tmp_path} --model {clip} --batch-size 8 --phrases 0 --out {tmp_path / 'run'}".split())
    assert stop.value.code == 2 and "there are only 1 samples" in capsys.readouterr().err
