import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from surgeon.corpus import bos_ids, load_corpus, prompt_ids, read_text
from surgeon.errors import BadInput, BadText
from surgeon.patients import FOLDER, heldout_text


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_windows_are_disjoint_and_begin_with_bos(tokenizer):
    text = heldout_text()[:20_000]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    corpus = load_corpus(tokenizer, text, "t", window=64)
    assert corpus.bos
    assert bool((corpus.windows[:, 0] == tokenizer.bos_token_id).all())
    assert corpus.windows[:, 1:].flatten().tolist() == ids[: len(ids) // 63 * 63]
    assert corpus.predicted == corpus.windows[:, 1:].numel()
    assert torch.equal(
        load_corpus(tokenizer, text, "t", window=64, windows=3).windows, corpus.windows[:3]
    )


def test_without_bos_windows_are_the_text(tokenizer):
    text = heldout_text()[:5_000]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    corpus = load_corpus(tokenizer, text, "t", window=64, bos="no")
    assert not corpus.bos
    assert corpus.windows.flatten().tolist() == ids[: len(ids) // 64 * 64]


def test_auto_is_read_off_the_ids(tokenizer):
    """The same tokenizer without its template prepends nothing, whatever its settings say."""
    assert bos_ids(tokenizer) == [tokenizer.bos_token_id]
    assert bos_ids(tokenizer, "no") == []
    bare = AutoTokenizer.from_pretrained(FOLDER)
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    assert bos_ids(bare) == []
    assert bos_ids(bare, "yes") == [bare.bos_token_id]


def test_prompts_follow_the_same_policy(tokenizer):
    assert prompt_ids(tokenizer, "Once")[0, 0] == tokenizer.bos_token_id
    assert prompt_ids(tokenizer, "Once", "no")[0, 0] != tokenizer.bos_token_id
    with pytest.raises(BadInput, match="empty"):
        prompt_ids(tokenizer, "", "no")


def test_bad_text_gets_a_sentence(tokenizer, tmp_path):
    file = tmp_path / "t.txt"
    for raw, words in (
        (b"", "empty"),
        (b" \n", "empty"),
        (b"a\0b", "NUL byte at character 1"),
        (b"ab\xff", "byte 2 is 0xff"),
    ):
        file.write_bytes(raw)
        with pytest.raises(BadText, match=words):
            read_text(file)
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadText, match="cannot be read"):
            read_text(path)
    with pytest.raises(BadText, match="less than one window of 255"):
        load_corpus(tokenizer, "Too short.", "t")
    with pytest.raises(BadInput, match=r"^window 1 leaves"):
        load_corpus(tokenizer, "x", "t", window=1)
    with pytest.raises(BadInput, match=r"^windows 0 leaves"):
        load_corpus(tokenizer, "x", "t", windows=0)
    with pytest.raises(BadInput, match=r"^bos maybe is"):
        bos_ids(tokenizer, "maybe")
