"""What the analysis counts: ranks, classes and places of tokens, the tables, and the figure of them."""

import numpy as np
import pytest
import torch

import figures
from analysis import analyze, draw, further_steps, print_numbers, ranks, spearman, token_class, word_positions
from tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")


def test_ranks_and_correlation_share_ties():
    """Against Spearman's definition, by pairwise comparison, with many ties; undefined for a constant."""
    x, y = (torch.randint(0, n, (200,), generator=torch.Generator().manual_seed(n)).float() for n in (4, 9))
    y = y + x
    by_hand = [((v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) + 1) / 2).double() for v in (x, y)]
    assert torch.equal(ranks(x), by_hand[0])
    a, b = (r - r.mean() for r in by_hand)
    assert spearman(x, y) == pytest.approx(((a * b).sum() / (a.norm() * b.norm())).item())
    assert spearman(x, x.exp()) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.ones(200)) is None


def test_token_classes_and_places_in_words():
    classes = {
        "space": (b" ", b"   ", b"\t"), "newline": (b"\n", b"  \n"), "name": (b" the", b"x1", b"_"),
        "digit": (b"7", b" 42"), "operator": (b" =", b"->"), "bracket": (b"()", b" ["),
        "quote": (b"'s", b'"'), "punctuation": (b".", b" #"), "not ASCII": (b"\xc3",), "control": (b"\x01",)}
    for kind, tokens in classes.items():
        assert {token_class(token) for token in tokens} == {kind}
    texts = [b"he", b"llo", b" the", b"re", b"(", b"x", b"_1", b" ", b"y", b""]
    which = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 1])
    assert word_positions(texts, which).tolist() == [1, 2, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2]


@pytest.fixture
def text():
    """Tokens of some text, and what a model could have said of them: (ids, said)."""
    generator = torch.Generator().manual_seed(0)
    ids = np.array([*("The cat sat, 42 times, on the mat. " * 9).encode(), BYTES.eot_token], np.uint16)
    nats = 5 * torch.rand(len(ids) - 1, generator=generator)
    steps = torch.randint(0, 4, (len(nats),), generator=generator).float()
    return ids, torch.stack((nats, (nats < 1).float(), steps))


def test_tables_hold_the_means_of_what_was_said(text):
    ids, said = text
    nats, _, steps = said
    found = analyze(BYTES, ids, said)
    assert found["rank_correlation"] == spearman(nats, steps)
    deciles = found["deciles"]
    assert len(deciles) == 10 and sum(row["tokens"] for row in deciles) == len(nats)
    assert sum(row["tokens"] * row["latent_steps"] for row in deciles) == pytest.approx(steps.sum().item())
    assert all(a["q_from"] <= a["q_to"] <= b["q_from"] for a, b in zip(deciles, deciles[1:]))
    hardest = nats.argsort(descending=True)[: deciles[0]["tokens"]]
    assert deciles[0]["loss"] == pytest.approx(nats[hardest].mean().item(), rel=1e-6)
    digits = torch.from_numpy(np.isin(ids[1:], list(b"0123456789")))
    row = next(row for row in found["classes"] if row["kind"] == "digit")
    assert row["tokens"] == digits.sum() and row["latent_steps"] == pytest.approx(steps[digits].mean().item())
    assert next(row for row in found["classes"] if row["kind"] == "end of text")["tokens"] == 1
    assert sum(row["tokens"] for row in found["word_positions"]) == len(nats)
    t = torch.from_numpy(ids[1:] == ord("t"))
    mean = pytest.approx(steps[t].mean().item())
    row = next(row for row in found["longest"] + found["shortest"] if row["token"] == "'t'")
    assert row == {"token": "'t'", "tokens": int(t.sum()), "latent_steps": mean}
    for a, b in zip(found["longest"], found["longest"][1:]):
        assert a["latent_steps"] >= b["latent_steps"]
    assert min(row["tokens"] for row in found["longest"]) >= 20


def test_further_steps_compare_the_tokens_that_took_them(text):
    _, said = text
    at_most = [said + torch.tensor([[0.5 * (3 - k)], [0], [0]]) for k in range(4)]
    at_most[1][1] = 0  # with one step nothing is right
    rows = further_steps(at_most)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        took = said[2] >= row["step"]
        assert row["tokens"] == took.sum()
        assert row["loss_without"] - row["loss_with"] == pytest.approx(0.5)
    right = said[1, said[2] >= 2].mean().item()
    assert (rows[1]["right_without"], rows[1]["right_with"]) == (0, pytest.approx(right))
    assert (rows[1]["only_with"], rows[1]["only_without"]) == (pytest.approx(right), 0)
    assert (rows[0]["only_with"], rows[2]["only_with"], rows[2]["only_without"]) == (0, 0, 0)
    assert further_steps(at_most[:1]) == []


def test_tables_are_printed_and_drawn(text, capsys, tmp_path):
    ids, said = text
    sweep = [{"tau": None, "max_latent": 0, "latent_steps": 0.0, "perplexity": 3.0, "best": True},
             {"tau": 0.5, "max_latent": 1, "latent_steps": 0.25, "perplexity": 2.5, "best": True}]
    found = {"sweep": sweep} | analyze(BYTES, ids, said) | {"further_steps": further_steps([said, said])}
    print_numbers(found)
    out = capsys.readouterr().out
    for words in ("max latent", "0.2500", "by class of the token", "end of text", "what step k brings"):
        assert words in out
    pytest.importorskip("matplotlib")
    for name, tables, beginning in (("a.png", found, b"\x89PNG"), ("a.pdf", {"sweep": sweep}, b"%PDF")):
        figures.save(draw(tables, "a$x_$b"), tmp_path / name)  # which is no formula
        assert (tmp_path / name).read_bytes().startswith(beginning)
