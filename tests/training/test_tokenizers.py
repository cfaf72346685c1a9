import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.training import tokenizers

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
