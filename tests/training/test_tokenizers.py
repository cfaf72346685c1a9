import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.data import tokenizers

REPO = Path(__file__).parents[2]

# Right-to-left marks, combining sequences, astral planes, a byte order mark, line ends of three kinds, non-characters.
TORTURE = (
    "\ufeffnaïve Ω≈ç√ e\u0301 \u202e\u05e9\u05dc\u05d5\u05dd "
    "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0010ffff \uffff \r\n\r\n\x01\x7f\x85\u2028 ﷽ 한국어"
)


def test_bytes_round_trip_torture():
    bytes_ = tokenizers.load("bytes")
    assert bytes_.decode(bytes_.encode(TORTURE)) == TORTURE


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_bytes_are_utf8_and_never_the_separator(text):
    tokenizer = tokenizers.load("bytes")
    ids = tokenizer.encode(text)
    assert list(ids) == list(text.encode("utf-8"))
    assert tokenizer.separator_id not in ids
    assert tokenizer.decode(ids.astype(np.int32)) == text


def test_a_window_may_cut_a_character():
    tokenizer = tokenizers.load("bytes")
    assert tokenizer.decode(tokenizer.encode("aé")[:2]) == "a\ufffd"


@pytest.mark.parametrize("text, says", [("ab\0c", "at byte 2"), ("ab\ud800", r"'\\ud800' at character 2")])
def test_what_is_not_text_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        tokenizers.load("bytes").encode(text)


def test_unknown_tokenizer():
    with pytest.raises(ValueError, match=r"^data.tokenizer is 'words': write bytes, bpe:<size> or file:<path>$"):
        tokenizers.load("words")


# --- Subwords --------------------------------------------------------------------------------------------------------

ENGLISH = "the quick brown fox jumps over the lazy dog " * 20 + "def function(self): return self.value\n" * 20


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizers.train_bpe([ENGLISH, TORTURE], 300, path)
    return path


@pytest.fixture(scope="module")
def bpe(bpe_file):
    return tokenizers.load("bpe:300", bpe_file)


def test_bpe_round_trips_torture_it_has_never_seen(bpe, tmp_path):
    tokenizers.train_bpe([ENGLISH], 300, tmp_path / "ascii.json")
    for tokenizer in (bpe, tokenizers.load("bpe:300", tmp_path / "ascii.json")):
        for text in (TORTURE, ENGLISH, "", " ", "\0nul", "<|endoftext|> <s> [UNK]", "\n\n  \t x"):
            assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_round_trips_any_text_and_never_gives_the_separator(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert ids.dtype == np.dtype("<u2")
    assert not len(ids) or 1 <= ids.min() <= ids.max() < bpe.vocab_size


def test_bpe_has_the_size_asked_for_and_packs_text(bpe):
    assert bpe.vocab_size == 300
    assert bpe.lossless
    assert len(bpe.encode(ENGLISH)) < len(ENGLISH) / 2.5
    # A single byte is a token of its own, so 256 ids and the separator are the least there can be.
    assert sorted(len(bpe.encode(chr(i))) for i in range(1, 128)) == [1] * 127


def test_bpe_is_a_function_of_its_text(tmp_path):
    """Other runs, other numbers of threads: the merges are the same."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom scaling.data import tokenizers\n"
        "tokenizers.train_bpe([open(sys.argv[1]).read()] * 3, 600, Path(sys.argv[2]))\n"
        "print(tokenizers.load('bpe:600', Path(sys.argv[2])).fingerprint)"
    )
    found = set()
    for threads in (1, 4):
        command = [sys.executable, "-c", code, tokenizers.__file__, str(tmp_path / f"{threads}.json")]
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(threads)}
        done = subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_a_file_is_a_tokenizer_and_its_control_tokens_are_text(tmp_path, bpe_file):
    import tokenizers as hf

    theirs = hf.Tokenizer.from_file(str(bpe_file))
    theirs.add_special_tokens(["<|endoftext|>"])
    theirs.enable_truncation(5)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizers.load(f"file:{tmp_path / 'tokenizer.json'}")
    theirs.no_truncation()
    assert ours.vocab_size == theirs.get_vocab_size() + 1
    np.testing.assert_array_equal(ours.encode(ENGLISH), np.array(theirs.encode(ENGLISH).ids) + 1)
    text = "a <|endoftext|> b"
    assert theirs.get_vocab()["<|endoftext|>"] + 1 not in ours.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_a_sentencepiece_model_is_a_tokenizer(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    with open(tmp_path / "sp.model", "wb") as f:
        lines = iter([*ENGLISH.split("\n")] * 5)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=f, vocab_size=60, minloglevel=2, hard_vocab_limit=False
        )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    ours = tokenizers.load(f"file:{tmp_path / 'sp.model'}")
    text = "the lazy fox"
    assert ours.encode(text).tolist() == [i + 1 for i in theirs.encode(text)]
    assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == theirs.get_piece_size() + 1
    assert not ours.lossless


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("tokenizer.json", None, r"no such file: write file:<path> of a Hugging Face tokenizer\.json or a Sent"),
        ("vocab.txt", "a b", "no such file: write file:<path>"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a Hugging Face tokenizer \("),
        ("tokenizer.json", "[", r"tokenizer\.json: not a Hugging Face tokenizer \("),
        ("sp.model", "garbage", r"sp\.model: not a SentencePiece model"),
    ],
)
def test_tokenizer_files_that_are_none(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says) as caught:
        tokenizers.load(f"file:{tmp_path / name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, package", [("bpe:300", "tokenizers"), ("file:{}", "sentencepiece")])
def test_a_missing_library_is_named(tmp_path, monkeypatch, bpe_file, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.model").write_text("")
    (tmp_path / "copy.json").write_bytes(bpe_file.read_bytes())
    with pytest.raises(ValueError, match=rf"takes the package {package}: pip install 'scaling\[bpe\]'"):
        tokenizers.load(name.format(tmp_path / "a.model"), tmp_path / "copy.json")


def test_a_lone_surrogate_is_no_text_for_any_tokenizer(bpe):
    with pytest.raises(ValueError, match=r"'\\ud800' at character 2"):
        bpe.encode("ab\ud800")
