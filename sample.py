"""Text from a checkpoint, and how long the model thought about each token.

    python sample.py out/tiny "def main"
    python sample.py out/tiny --prompt_file=notes.txt --num_samples=3 --html=thoughts.html
    echo -n "import " | python sample.py out/tiny

What is notable here:
* Text streams as it is made, each token coloured by the latent steps that were executed before it was said. A
  character that spans several tokens is held back until it is whole. The prompt is coloured too.
* Several texts are made in one batch, each as if alone: text i of a seed is the first text of seed + i.
"""

from common import answer_help

answer_help(__file__)

import codecs
import html
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch

from common import BadInput, autocast, check_output, configure, load_checkpoint
from common import pick_device, precision, reason, run, write_whole
from documents import cut, encode
from fast import compile_ticks, compiles, lay_out
from model import LLaMA

ANSI = (0, 114, 220, 208, 203, 199, 165, 129, 93)  # 256-colour codes for 0, 1, 2, … latent steps
CSS = "transparent #d9f2d9 #fff3b0 #ffd6a5 #ffadad #ff9bd2 #e3a5ff #c4a5ff #a5a8ff".split()


@dataclass
class Sample:
    run: str = "out/tiny"  # folder of a run, or a checkpoint
    prompt: str | None = None  # the text to go on from; without one, --prompt_file or standard input
    prompt_file: str = ""  # file that holds the prompt
    num_samples: int = 1  # texts to write, all from the same prompt
    max_new_tokens: int = 400  # tokens to write at most; a text may end by itself before
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = None  # sample among the k likeliest; 0 or None: among all
    top_p: float | None = 0.95  # sample among the likeliest that hold this mass
    seed: int = 1337  # of the first text; the others draw with the seeds that follow
    tau: float | None = None  # τ at test time: higher halts sooner
    max_latent: int | None = None  # most latent steps at test time
    method: str | None = None  # checked against the checkpoint's, if given
    compile: bool = False  # torch.compile decoding: the first tokens wait for it, the others come faster
    plain: bool = False  # no colours
    html: str = ""  # also write a page with the colours, and numbers on hover
    device: str = ""  # cpu, cuda or cuda:N; empty: cuda where there is one
    dtype: str = ""  # bfloat16 or float32; empty: what the device does well


@dataclass
class Piece:
    """One token of a text: its bytes, and what it took to say it."""

    text: bytes
    steps: int | None  # executed latent steps behind it; None: the first token, which nobody predicted
    reach: float  # expected latent steps, Σ_{k≥1} r[t,k]
    prob: float  # the probability that the model gave it

    def numbers(self) -> str:
        if self.steps is None:
            return "start of the text"
        return f"{self.steps} latent steps, expected {self.reach:.2f}, probability {self.prob:.4f}"


def whole_characters(pieces: Iterable[Piece]) -> Iterator[tuple[str, list[Piece]]]:
    """Joins pieces until their bytes are whole UTF-8 characters: (text, the pieces behind it)."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, held = "", []
    for piece in pieces:
        text += decoder.decode(piece.text)
        held.append(piece)
        if text and not decoder.getstate()[0]:
            yield text, held
            text, held = "", []
    text += decoder.decode(b"", final=True)
    if text:
        yield text, held


def most_steps(pieces: list[Piece]) -> int:
    return max(piece.steps or 0 for piece in pieces)


def colour(palette, steps: int):
    return palette[min(steps, len(palette) - 1)]


def html_page(title: str, note: str, texts: list[list[Piece]]) -> str:
    """A self-contained page: the texts, each token on the colour of its steps, its numbers on hover."""
    def span(steps: int, content: str, more: str = "") -> str:
        return f'<span style="background:{colour(CSS, steps)}"{more}>{content}</span>'

    blocks = []
    for pieces in texts:
        spans = []
        for text, group in whole_characters(pieces):
            hover = "; ".join(piece.numbers() for piece in group)
            spans.append(span(most_steps(group), html.escape(text), f' title="{hover}"'))
        blocks.append(f"<pre>{''.join(spans)}</pre>\n")
    scale = " ".join(span(k, f"&nbsp;{k}&nbsp;") for k in range(max(map(most_steps, texts)) + 1))
    fill = {"title": html.escape(title), "note": html.escape(note), "legend": scale, "texts": "".join(blocks)}
    return Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(fill)


@torch.no_grad()
def explain(model: LLaMA, tokenizer, ids: list[int]) -> list[Piece]:
    """The pieces of a given text, by one forward: each token with the thinking done at the one before it."""
    ids = torch.tensor([ids], device=model.embed.weight.device)
    out = model(ids)
    if not out.logits.isfinite().all():
        raise BadInput("the model's predictions are not finite (NaN or infinity): its training has diverged")
    prob = out.logits[0, :-1].float().softmax(1).gather(1, ids[0, 1:, None]).squeeze(1)
    first, *others = [tokenizer.decode_single_token_bytes(i) for i in ids[0].tolist()]
    pieces = [Piece(first, None, 0.0, 1.0)]
    numbers = out.steps[0].tolist(), out.expected_steps[0].tolist(), prob.tolist()
    for text, steps, reach, p in zip(others, *numbers):
        pieces.append(Piece(text, int(steps), reach, p))
    return pieces


def say(text: str) -> None:
    print(f"sample.py: {text}", file=sys.stderr)


def read_prompt(config: Sample) -> str:
    """The prompt from where the settings say. Raises BadInput."""
    if config.prompt is not None:
        if config.prompt_file:
            raise BadInput("give a prompt or --prompt_file, not both")
        return config.prompt
    try:
        if config.prompt_file:
            return Path(config.prompt_file).read_text(encoding="utf-8-sig")
        return "" if sys.stdin.isatty() else read_standard_input()
    except OSError as error:
        raise BadInput(f"--prompt_file {config.prompt_file} cannot be read: {reason(error)}") from None
    except UnicodeDecodeError:
        where = config.prompt_file or "standard input"
        raise BadInput(f"{where} is not UTF-8 text, as prompts are") from None


def read_standard_input() -> str:
    """All of it; where that takes time, it says what it waits for."""
    waiting = threading.Timer(1, say, ["waits for the end of standard input, which is to hold the prompt"])
    waiting.daemon = True
    waiting.start()
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    finally:
        waiting.cancel()


def prompt_tokens(text: str, tokenizer, context: int) -> list[int]:
    """At least one, and no more than the context holds. Raises BadInput."""
    parts = encode(tokenizer, cut(text))
    if None in parts:
        raise BadInput("the prompt cannot be encoded: the tokenizer gives up on it")
    ids = [token for part in parts for token in part]
    if not ids:
        say("the prompt is empty: a text begins, as after <|endoftext|>")
    if len(ids) > context:
        say(f"the prompt has {len(ids):,} tokens, the context {context:,}: only its end is read")
    return ids[-context:] or [tokenizer.eot_token]


def generate(model: LLaMA, tokenizer, ids: list[int], config: Sample) -> Iterator[tuple[int, Piece]]:
    """(which text, its next piece), in the order in which they are said; <|endoftext|> is no piece."""
    settings = config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.seed
    for new in model.generate([ids] * config.num_samples, *settings, stop=tokenizer.eot_token):
        numbers = new.row, new.token, new.steps, new.expected_steps, new.prob
        for row, token, steps, reach, prob in zip(*(t.tolist() for t in numbers)):
            if token != tokenizer.eot_token:
                known = token < tokenizer.n_vocab  # the model's vocabulary may be padded
                text = tokenizer.decode_single_token_bytes(token) if known else b""
                yield row, Piece(text, int(steps), reach, prob)


def first_of(said: Iterator[tuple[int, Piece]], texts: list[list[Piece]]) -> Iterator[Piece]:
    """The pieces of the first text as they come; appends all to their texts meanwhile."""
    yield from list(texts[0])
    for row, piece in said:
        texts[row].append(piece)
        if row == 0:
            yield piece


def show(pieces: Iterable[Piece], colours: bool) -> None:
    """Writes a text as its pieces come."""
    for text, group in whole_characters(pieces):
        steps = most_steps(group)
        sys.stdout.write(f"\x1b[38;5;{colour(ANSI, steps)}m{text}\x1b[0m" if colours and steps else text)
        sys.stdout.flush()


def main() -> None:
    config = configure(Sample, positional=("run", "prompt"))
    device = pick_device(config.device)
    if config.html:
        check_output(config.html, "--html")
    model, tokenizer, _ = load_checkpoint(config.run, device)
    if config.method not in (None, model.config.method):
        raise BadInput(f"{config.run} holds a model of method {model.config.method}, not {config.method}")
    ids = prompt_tokens(read_prompt(config), tokenizer, model.config.block_size)
    model.tau = model.tau if config.tau is None else config.tau
    model.max_latent = model.max_latent if config.max_latent is None else config.max_latent
    lay_out(model, precision(device, config.dtype))
    if compiles(config.compile, device):
        say("compiling; the first tokens take a while")
        compile_ticks(model)
    colours = sys.stdout.isatty() and not config.plain
    if colours:
        scale = [f"\x1b[38;5;{colour(ANSI, k)}m{k}\x1b[0m" if k else "0" for k in range(model.max_latent + 1)]
        print("latent steps: " + " ".join(scale) + "\n")

    with autocast(device, config.dtype):
        prompt = explain(model, tokenizer, ids)
        prompt[0].text = b"" if ids == [tokenizer.eot_token] else prompt[0].text
        texts = [list(prompt) for _ in range(config.num_samples)]
        began = time.perf_counter()
        streams = [first_of(generate(model, tokenizer, ids, config), texts), *texts[1:]]
        for i, pieces in enumerate(streams, 1):
            if config.num_samples > 1:
                print("\n\n" * (i > 1) + f"--- text {i} of {config.num_samples} ---")
            show(pieces, colours)
        took = time.perf_counter() - began

    new = [piece for pieces in texts for piece in pieces[len(prompt) :]]
    mean = sum(piece.steps for piece in new) / max(1, len(new))
    ended = sum(len(pieces) - len(prompt) < config.max_new_tokens for pieces in texts)
    print(f"\n\n{len(new)} tokens, {len(new) / took:.1f} tokens/s, {mean:.2f} latent steps per token of at "
          f"most {model.max_latent}; ended by themselves: {ended} of {len(texts)} texts", file=sys.stderr)
    if config.html:
        note = f"{config.run}, τ {model.tau}, ℓ_max {model.max_latent}; {mean:.2f} latent steps per new token"
        write_whole(config.html, html_page("What the model thought about", note, texts))
        print(f"written: {config.html}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
