"""Tokenizers are restored as they were, hostile ones refused, and tokenizer.json gives the same tokens."""

import hashlib
import json

import pytest
import tiktoken

from common import BadInput, save_checkpoint
from conftest import uneven
from tokenizer import (
    END, alphabet, describe, from_json, get_tokenizer, halves, make_tokenizer, ranks_to_text,
    restore_tokenizer, same_tokens, to_json)

BYTES = {bytes([i]): i for i in range(256)}
CODE = "def f(x):\n\treturn x[1:-1]  + 0x1F * 100_000\n\n\n    # don't, we'll, I'VE  \r\n"
SIGNS = "👩‍👩‍👧 🏳️‍🌈 café cafe\u0301 ı\u0307\u0323 각 가\u11a8 ½ ② ١٢٣ 123 4567 \u00a0\u2028\u3000\x85 思考 \ufb01"
TEXTS = [CODE, SIGNS, "".join(chr(i) for i in range(0x800)), "a 1  2   3\n\n 4 \t5 " * 3]
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LEVEL = GPT2 | {"use_regex": False}
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": [*parts]}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def digits(one):
    return {"type": "Digits", "individual_digits": one}


CUTS = {  # name → pre_tokenizer, normalizer
    "gpt2": (GPT2, None), "alone": (sequence(GPT2), None), "smollm": (sequence(digits(True), GPT2), None),
    "grouped": (sequence(digits(False), GPT2), None),
    "llama3": (sequence(split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), LEVEL), None),
    "qwen2": (sequence(split(QWEN2), LEVEL), {"type": "NFC"})}


@pytest.fixture(scope="session")
def spec():
    """The tokenizer.json of byte-level BPE that `tokenizers` has learnt from a text, as a dict to change."""
    tokenizers = pytest.importorskip("tokenizers")
    made = {}

    def give(*how):
        if str(how) not in made:
            made[str(how)] = learn(*how)
        return json.loads(made[str(how)])

    def learn(pre=GPT2, normalizer=None, whole=True):
        empty = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
                 "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": None,
                 "decoder": GPT2, "model": {"type": "BPE", "vocab": {}, "merges": []}}
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(empty))
        letters = tokenizers.pre_tokenizers.ByteLevel.alphabet() if whole else []
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=600, special_tokens=[END, "<|x|>"], initial_alphabet=letters, show_progress=False)
        tokenizer.train_from_iterator([__doc__, *TEXTS, (CODE + SIGNS) * 4, open(__file__).read()], trainer)
        return tokenizer.to_str()
    return give


def read(folder, spec, end=None):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(spec) if isinstance(spec, dict) else spec, encoding="utf-8")
    return from_json(path, end)


# ------------------------------------------------------------------------------------- ranks and descriptions


def test_the_byte_tokenizer_is_utf_8():
    tokenizer = get_tokenizer("bytes")
    text = "def f(x):\n\treturn 'ü思'  # \0"
    assert tokenizer.encode_ordinary(text) == list(text.encode()) and tokenizer.n_vocab == 257


def test_a_download_that_fails_says_why(monkeypatch):
    def fails(name):
        raise ConnectionError()

    monkeypatch.setattr(tiktoken, "get_encoding", fails)
    with pytest.raises(BadInput, match="gpt2 could not be downloaded .ConnectionError.*ranks.tiktoken"):
        get_tokenizer("gpt2")


@pytest.mark.parametrize("change", [
    {"special": {END: 10**8}}, {"special": {END: -1}}, {"special": {END: "256"}}, {"special": {END: 5}},
    {"special": {}}, {"special": {"<|x|>": 256}}, {"special": {END: 256.0}}, {"special": [256]},
    {"pattern": "("}, {"pattern": None}, {"sha256": ""}])
def test_a_hostile_description_is_refused(change):
    tokenizer = get_tokenizer("bytes")
    with pytest.raises((ValueError, TypeError, AttributeError)):
        restored = restore_tokenizer(describe(tokenizer) | change, ranks_to_text(tokenizer))
        raise ValueError if describe(restored) != describe(tokenizer) | change else AssertionError


def test_hostile_ranks_are_refused():
    for number in (b"100000000", b"-1", b"7"):
        ranks = ranks_to_text(get_tokenizer("bytes")).replace(b" 255", b" " + number)
        description = describe(get_tokenizer("bytes")) | {"sha256": hashlib.sha256(ranks).hexdigest()}
        with pytest.raises(ValueError):
            restore_tokenizer(description, ranks)


def test_the_tokenizer_of_a_run_is_its_own(tmp_path):
    own = make_tokenizer("own", r"\S+|\s+", BYTES | {b"do": 256})
    save_checkpoint(tmp_path / "ckpt.pt", uneven("vanilla", vocab_size=258), own)
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        assert describe(get_tokenizer(str(path))) == describe(own)
    with pytest.raises(BadInput, match="ckpt.pt does not exist"):
        get_tokenizer(str(tmp_path.parent))


def test_names_are_no_difference_between_tokenizers():
    one, other = (describe(make_tokenizer(name, r"\S+|\s+", BYTES)) for name in ("one", "other"))
    assert one != other and same_tokens(one, other)
    assert not same_tokens(one, describe(make_tokenizer("one", r"\S+|\s", BYTES)))


def test_form_c_and_missing_bytes_are_restored():
    ranks = {byte: i for byte, i in BYTES.items() if byte != b"\x04"}
    tokenizer = make_tokenizer("x", r"\S+|\s+", ranks, {END: 4}, nfc=True)
    assert tokenizer.n_vocab == 256 and tokenizer.eot_token == 4
    again = restore_tokenizer(describe(tokenizer), ranks_to_text(tokenizer))
    assert describe(again) == describe(tokenizer) and again.n_vocab == 256
    for made in (tokenizer, again):
        assert made.encode_ordinary("a\x04b") == [97, 98], "a byte that is no token is left out"
        assert made.encode_ordinary_batch(["e\u0301"]) == [[*"é".encode()]]
    assert describe(get_tokenizer("bytes")).keys() == describe(tokenizer).keys() - {"nfc"}, "as it was before"


# --------------------------------------------------------------------------------------------- tokenizer.json


@pytest.mark.parametrize("name,whole", [*((name, True) for name in CUTS), ("smollm", False)])
def test_tokens_are_those_of_hugging_face(name, whole, spec, tmp_path):
    """There, after the way back, and after a second way there."""
    from tokenizers import Tokenizer
    given = spec(*CUTS[name], whole)
    ours = read(tmp_path, given)
    theirs = Tokenizer.from_str(json.dumps(given))
    back = Tokenizer.from_str(to_json(ours))
    again = read(tmp_path, to_json(ours))
    assert same_tokens(describe(again), describe(ours))
    assert ours.n_vocab == theirs.get_vocab_size() and ours.eot_token == theirs.token_to_id(END)
    for text in TEXTS:
        tokens = theirs.encode(text).ids
        assert ours.encode_ordinary(text) == again.encode_ordinary(text) == back.encode(text).ids == tokens
    assert len(ours.encode_ordinary(CODE)) < 0.7 * len(CODE), "merges are used"
    assert back.encode(END).ids == [ours.eot_token] != ours.encode_ordinary(END), "special tokens are kept"


def test_a_tokenizer_of_tiktoken_goes_out_and_comes_back(spec, tmp_path):
    from tokenizers import Tokenizer
    pairs = make_tokenizer("pairs", r"\w+|\W+", BYTES | {b"do": 256, b"ado": 257})
    for ours in (get_tokenizer("bytes"), pairs):
        back = Tokenizer.from_str(to_json(ours))
        for text in (*TEXTS, "do ado a-do"):
            assert back.encode(text).ids == ours.encode_ordinary(text)
        assert same_tokens(describe(read(tmp_path, to_json(ours))), describe(ours))


def test_digits_in_threes_go_out_as_they_are_cut_here():
    tokenizers = pytest.importorskip("tokenizers")
    ranks = BYTES | {b"12": 256, b"34": 257, b"123": 258, b"1234": 259}
    ours = make_tokenizer("threes", r"\p{N}{1,3}+|\P{N}++", ranks)
    theirs = tokenizers.Tokenizer.from_str(to_json(ours))
    for text in ("1234", "12 12345678x9"):
        assert theirs.encode(text).ids == ours.encode_ordinary(text)
    with pytest.raises(ValueError, match="means something else"):
        to_json(make_tokenizer("odd", r"\p{N}{1,3}+x|\p{N}|\P{N}", ranks))


def test_halves_are_what_a_token_is_merged_from():
    ranks = BYTES | {b"ab": 256, b"bc": 257, b"abc": 258, b"xyz": 259}
    assert halves(b"abc", ranks) == [b"ab", b"c"] and halves(b"bc", ranks) == [b"b", b"c"]
    assert len(halves(b"xyz", ranks)) == 3 and len(halves(b"a", ranks)) == 1


def test_the_alphabet_of_bytes_is_gpt2s():
    tokenizers = pytest.importorskip("tokenizers")
    assert set(alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert "".join(alphabet()[byte] for byte in "é x\n".encode()) == "Ã©ĠxĊ"


def test_a_text_ends_with_what_config_json_says(spec, tmp_path):
    given = json.loads(json.dumps(spec()).replace(END, "<|end_of_text|>"))
    ours = read(tmp_path, given, end=0)
    assert ours.eot_token == 0 and "<|end_of_text|>" not in ours.special_tokens_set
    for end in (None, 300):
        with pytest.raises(BadInput, match="no token ends a text: want .*eos_token_id in config.json"):
            read(tmp_path, given, end)


def test_every_number_is_a_token(spec, tmp_path):
    """A token that no merge makes is never found in text, nor is the number that nothing has."""
    given = spec()
    given["model"]["vocab"]["qqq"] = 700
    given["added_tokens"].append(given["added_tokens"][0] | {"id": 701, "content": "<|last|>"})
    ours = read(tmp_path, given)
    assert ours.n_vocab == 702 and all(ours.decode_single_token_bytes(i) for i in range(702))
    from tokenizers import Tokenizer
    assert ours.encode_ordinary("qqq") == Tokenizer.from_str(json.dumps(given)).encode("qqq").ids


def change(**settings):
    return lambda spec: spec.update(settings)


def change_model(**settings):
    return lambda spec: spec["model"].update(settings)


def swap_merges(spec):
    spec["model"]["merges"].insert(0, spec["model"]["merges"].pop())


PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
FAR_AWAY = {"id": 10**12, "content": "<far>", "special": True}
BLANKS = {"id": 900, "content": "    ", "special": False}


@pytest.mark.parametrize("broken,words", [
    (change_model(type="WordPiece"), "WordPiece.*byte-level BPE"),
    (change_model(byte_fallback=True), "SentencePiece"),
    (change(pre_tokenizer=sequence(split(r"\p{N}{1,3}+|\P{N}+"), LEVEL)), "want Byte"),
    (lambda spec: [spec["model"]["vocab"].pop("Z"), spec["model"].update(unk_token="a")], "unk_token 'a'"),
    (change_model(dropout=0.1), "dropout 0.1"), (change_model(end_of_word_suffix="</w>"), "end_of_word"),
    (change(normalizer=PREPEND), "Prepend"), (change(normalizer={"type": "NFKC"}), "NFKC"),
    (change(pre_tokenizer=None), "want Byte"), (change(pre_tokenizer={"type": "Metaspace"}), "want Byte"),
    (change(pre_tokenizer=GPT2 | {"add_prefix_space": True}), "without add_prefix_space"),
    (change(pre_tokenizer=sequence(split("a+"), digits(True), LEVEL)), "alone or after one"),
    (change(pre_tokenizer=sequence(split("a+") | {"behavior": "Removed"}, LEVEL)), "isolating"),
    (change(pre_tokenizer=sequence(split("a+") | {"invert": True}, LEVEL)), "isolating"),
    (change(pre_tokenizer=sequence(split("a+"), GPT2)), "alone or after one"),
    (change(pre_tokenizer=sequence(split(r"\w+|\s+"), LEVEL)), "does not match .* characters"),
    (change(pre_tokenizer=sequence(split(""), LEVEL)), "cannot be used"),
    (change_model(vocab={}, merges=[]), "no token"),
    (lambda spec: spec["added_tokens"].append(FAR_AWAY), "not far beyond how many"),
    (change(pre_tokenizer=sequence(split("("), LEVEL)), ""), (swap_merges, "order of its merges"),
    (change(added_tokens=[BLANKS]), "cuts text"), (change(model=None), ""),
    (lambda spec: spec["model"].pop("merges"), "'merges'"), (change_model(merges=[["a", "zzz"]]), "azzz"),
    (lambda spec: spec["model"]["vocab"].update({"a": 1}), "number must be its own")])
def test_what_is_not_supported_is_named(broken, words, spec, tmp_path):
    given = spec()
    broken(given)
    with pytest.raises(BadInput, match=f"tokenizer.json cannot be used: .*({words})"):
        read(tmp_path, given)


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"model": 3}', "[" * 200_000], ids=len)
def test_what_is_no_tokenizer_json(text, tmp_path):
    with pytest.raises(BadInput, match="tokenizer.json cannot be used"):
        read(tmp_path, text)


def test_a_tokenizer_json_is_a_tokenizer_by_its_name(spec, tmp_path):
    tokenizer = read(tmp_path, spec())
    assert describe(get_tokenizer(str(tmp_path / "tokenizer.json"))) == describe(tokenizer)
    with pytest.raises(BadInput, match="not_there.json cannot be used"):
        get_tokenizer(str(tmp_path / "not_there.json"))
