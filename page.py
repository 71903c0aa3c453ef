"""How a text shows the thinking behind it: in a terminal, and as a page with a lens on every token.

    pieces = explain(model, tokenizer, ids)
    write_whole("thoughts.html", html_page("out/tiny", model, tokenizer, [pieces]))

What is notable here:
* What the model would answer after k latent steps is what it answers with its dial max_latent turned down to
  k: a column never depends on the columns above it (METHOD.md §2), so the states are those of the whole
  forward, and only the exit mixture ends earlier. The lens is no second implementation of the model.
* Bytes are joined to characters, and characters to words, wherever tokens cut them.
* page.html is the whole look of the page, and can be changed freely: it reads the JSON that stands in it.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from common import check_predictions
from model import AdaptiveLatentCoT, LLaMA

LIKELIEST = 5  # next tokens that the lens shows after each step
BAR = 40  # characters of the bar that sums a text up
PAINT = (0, 229, 215, 210, 213, 177, 147, 117, 158)  # 256-colour codes of 1, 2, … latent steps; 0: none
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class View:
    """What the model would answer if a token had to be said after k latent steps."""

    reach: float  # r[t,k]: the probability that step k is entered
    prob: float  # of the token that was said
    likeliest: list[tuple[int, float]]  # the tokens with the highest probability, and that


@dataclass
class Piece:
    """One token of a text, and what it took to say it."""

    text: bytes
    steps: int = 0  # executed latent steps behind it
    token: int = 0
    views: list[View] = field(default_factory=list)  # after 0, 1, …, steps; none: the first token of a text


def contexts(n: int, context: int) -> Iterator[tuple[int, int, int]]:
    """A text of n tokens as `generate` reads it, its last half again where a context is full:
    (start, first, end): the tokens first … end − 1 were said after those from start on.
    """
    start, first = 0, 1
    while first < n:
        end = min(n, start + context + 1)
        yield start, first, end
        start, first = end - max(1, context // 2), end


def explain(model: LLaMA, tokenizer, ids: list[int]) -> list[Piece]:
    """The pieces of a text of any length; each is said by the state of the token before it.

    As the text is read in parallel here, ponder2's numbers are a little other than those of its decoding.
    """
    pieces = [Piece(bytes_of(tokenizer, ids[0]), token=ids[0])]
    for start, first, end in contexts(len(ids), model.config.block_size):
        thoughts = look(model, ids[start:end], end - first)
        for token, (steps, views) in zip(ids[first:end], thoughts):
            pieces.append(Piece(bytes_of(tokenizer, token), steps, token, views))
    return pieces


@torch.no_grad()
def look(model: LLaMA, ids: list[int], n: int) -> list[tuple[int, list[View]]]:
    """Latent steps and views of the last n of these tokens. Raises BadInput where a prediction is no number.

    One forward for each number of steps that the model may be held to.
    """
    idx = torch.tensor([ids[:-1]], device=model.embed.weight.device)
    said = torch.tensor(ids[-n:], device=idx.device)
    most = model.max_latent
    out = model(idx)
    answers = []  # (n,) for each number of steps that no token may exceed: probability of `said`, likeliest
    try:
        for k in range(int(out.steps[0, -n:].max())):
            model.max_latent = k
            answers.append(answer(model(idx).logits[0, -n:], said))
    finally:
        model.max_latent = most
    whole = answer(out.logits[0, -n:], said)
    thoughts = []
    for i, (k, reach) in enumerate(zip(out.steps[0, -n:].int().tolist(), out.reach[0, -n:].tolist())):
        said_after = [*answers[:k], whole]
        views = [View(r, *each[i]) for r, each in zip([1.0, *reach], said_after)]
        thoughts.append((k, views))
    return thoughts


def answer(logits: Tensor, said: Tensor) -> list[tuple[float, list[tuple[int, float]]]]:
    """logits (n, V), said (n,) → of each the probability of said, and the LIKELIEST tokens with theirs."""
    share = logits.float().softmax(1)
    check_predictions(share)
    prob, token = share.topk(min(LIKELIEST, share.size(1)), 1)
    likeliest = [list(zip(*row)) for row in zip(token.tolist(), prob.tolist())]
    return list(zip(share.gather(1, said[:, None])[:, 0].tolist(), likeliest))


def bytes_of(tokenizer, token: int) -> bytes:
    """Of a token; none for a number that is no token's: the model's vocabulary may be larger."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return b""


# --------------------------------------------------------------------------------------- characters and words


def whole_characters(pieces: Iterable[Piece]) -> Iterator[tuple[str, list[Piece]]]:
    """Joins pieces until their bytes are whole UTF-8 characters: (text, the pieces behind it)."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    held = []
    for piece in pieces:
        text += decoder.decode(piece.text)
        held.append(piece)
        if text and not decoder.getstate()[0]:
            yield text, held
            text = ""
            held = []
    text += decoder.decode(b"", final=True)
    if text:
        yield text, held


def words(pieces: Iterable[Piece]) -> Iterator[list[tuple[str, list[Piece]]]]:
    """Joins what whole_characters gives to words, runs of blanks and runs of other signs, each a list of it.

    A token that begins with a blank and goes on otherwise, as " the" of GPT-2's tokens, begins a word.
    """
    word = []
    last = ""
    for text, group in whole_characters(pieces):
        goes_on = kind(text) == kind(last[-1:]) and (not text[0].isspace() or text.isspace())
        if word and not goes_on:
            yield word
            word = []
        word.append((text, group))
        last = text
    if word:
        yield word


def kind(text: str) -> str:
    """Whether a text begins, blanks apart, with a letter or digit, with another sign, or not at all."""
    first = text.lstrip()[:1]
    if not first:
        return "blank"
    return "letter" if first.isalnum() or first == "_" else "sign"


# --------------------------------------------------------------------------------------------------- the page


def dials(model: LLaMA) -> str:
    """What bounds the thoughts of a model, to be added to a title: τ only where there is one."""
    tau = f", τ {model.tau:g}" if isinstance(model, AdaptiveLatentCoT) and model.max_latent else ""
    return f"{tau}, ℓ_max {model.max_latent}" if model.config.method != "vanilla" else ""


def html_page(note: str, model: LLaMA, tokenizer, texts: list[list[Piece]],
              prompt: int | None = None) -> str:
    """A page that needs nothing else: page.html with the texts, as JSON, in the place of its word DATA.

    note: what made the texts. prompt: how many pieces of each were given to the model; None: all, to read.
    """
    given = prompt or 0
    shown = [{"prompt": laid_out(text[:given]), "text": laid_out(text[given:])} for text in texts]
    pieces = [piece for text in texts for piece in text]
    tokens = {piece.token for piece in pieces}
    tokens |= {token for piece in pieces for view in piece.views for token, _ in view.likeliest}
    names = {i: bytes_of(tokenizer, i).decode("utf-8", "backslashreplace") for i in sorted(tokens)}
    method = model.config.method if model.config.max_latent else "vanilla"
    data = {"note": note, "method": method, "most": model.max_latent,
            "written": prompt is not None, "names": names, "texts": shown}
    dense = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    safe = dense.replace("<", "\\u003c")  # no text ends the script that it stands in
    return TEMPLATE.read_text(encoding="utf-8").replace(">DATA<", f">{safe}<", 1)


def laid_out(pieces: list[Piece]) -> list:
    """Words, each a list of tokens [text, its number, view, view, …]; a view is [reach, prob of the token,
    likeliest token, its prob, next likeliest, its prob, …].

    Of a character that several tokens make up the last has the text, and the others have none.
    """
    found = []
    for word in words(pieces):
        found.append([])
        for text, group in word:
            for piece in group:
                views = []
                for view in piece.views:
                    views.append([round(view.reach, 4), short(view.prob)])
                    for token, prob in view.likeliest:
                        views[-1] += [token, short(prob)]
                found[-1].append([text if piece is group[-1] else "", piece.token, *views])
    return found


def short(x: float) -> float:
    """To four digits."""
    return float(f"{x:.4g}")


# ----------------------------------------------------------------------------------------------- the terminal


def wants_colour(stream) -> bool:
    """Whether a stream is a terminal whose user has not set NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, steps: int, dim: bool = False) -> str:
    """A text on the background of its latent steps; a line's end, which has none, shows a coloured blank."""
    code = "2" if dim else ""
    if steps:
        code = f"38;5;{240 if dim else 16};48;5;{PAINT[min(steps, len(PAINT) - 1)]}"
        text = text.replace("\n", " \n")
    lines = text.split("\n")
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if code and line else line for line in lines)


def legend(most: int) -> str:
    """The backgrounds of 0 … most latent steps, and how a prompt looks."""
    scale = " ".join(painted(f" {k} ", k) for k in range(most + 1))
    return f"latent steps before a token was said: {scale}   {painted('dim: the prompt', 0, dim=True)}"


def bar(steps: list[int], colours: bool) -> str:
    """The shares of tokens that took 0, 1, 2, … steps, as so many digits of BAR; empty without any."""
    ordered = sorted(steps)
    places = [ordered[(2 * i + 1) * len(ordered) // (2 * BAR)] for i in range(BAR * bool(ordered))]
    return "".join(painted(str(min(k, 9)), k * colours) for k in places)
