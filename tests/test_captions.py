"""Captions to sentences and phrases, against the authors' numbers."""

import gzip
import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import data


def test_sentences_golden(golden):
    for case in json.loads((golden / "sentences.json").read_text()):
        assert data.clean(case["caption"]) == case["clean"]
        assert data.split_sentences(case["clean"]) == case["sentences"]


def test_phrases_golden(golden):
    spacy = pytest.importorskip("spacy")
    vocab = spacy.blank("en").vocab
    matchers = data.phrase_matchers(vocab)
    for case in json.loads((golden / "phrases.json").read_text()):
        tokens, sentences = iter(case["tokens"]), []
        for length in case["sentence_lengths"]:  # heads count from the sentence's first token
            part = [next(tokens) for _ in range(length)]
            doc = spacy.tokens.Doc(vocab, words=[t["text"] for t in part], pos=[t["pos"] for t in part],
                                   deps=[t["dep"] for t in part], heads=[t["head"] for t in part])
            sentences.append(data.extract_phrases(doc, matchers))
        assert data.order_phrases(sentences) == case["phrases"]


def test_curly_quotes_are_straightened_before_the_real_bpe():
    shared = Path(data.__file__).parent.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("no ../shared/data")
    lines = gzip.open(shared / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8").read().split("\n")
    merges = [tuple(line.split()) for line in lines[1:48895]]
    tokens = list(bytes_to_unicode().values())
    tokens += [token + "</w>" for token in tokens] + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    assert len(tokenizer) == 49408
    # CLIP's README and notebooks: "a diagram" is 320 22697
    assert data.tokenize(tokenizer, ["a diagram"], [248])[0].tolist() == [49406, 320, 22697, 49407]
    curly, straight = data.tokenize(tokenizer, ["the dog’s “ball”", "the dog's \"ball\""], [248, 248])
    assert curly.tolist() == straight.tolist()
    captions = [row["caption"] for row in json.loads((shared / "urban1k_captions.json").read_text())]
    assert max(map(len, data.tokenize(tokenizer, captions, [999] * 50))) <= data.CONTEXT
