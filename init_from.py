"""Starting a training from trained weights, one's own or imported ones: train.py --init_from.

What is notable here:
* A run takes the shape of its source, and keeps the scale of its embedding: without a latent step it says
  exactly what the source said.
* A new router that is to meet a budget starts with τ above every reach, and the budget lets thoughts in.
"""

import math
from dataclasses import replace

import torch

from configurator import BadInput, typed
from model import Config, LLaMA
from prepare import Data
from runs import say
from schedule import is_adaptive
from tokenizer import describe, same_tokens

SHAPE = (  # settings that belong to trained weights: --init_from takes them over
    "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_ff", "tie_embeddings",
    "qkv_bias", "qk_norm", "rope_theta", "rope_scaling", "norm_eps", "embed_scale")


def check_source(config, tokenizer, data: Data) -> None:
    """Raises BadInput where the model to start from reads other tokens than those of the data."""
    if not same_tokens(describe(tokenizer), describe(data.tokenizer)):
        raise BadInput(f"{config.data} was prepared with another tokenizer ({data.tokenizer.name}) than that "
                       f"of {config.init_from} ({tokenizer.name}): prepare.py --tokenizer={config.init_from} "
                       "makes its tokens")


def take_shape(config, source: Config):
    """config (a Train) with the shape of the model that it starts from, or that a resumed run started from.

    Raises BadInput where the method cannot have this shape.
    """
    shape = {name: getattr(source, name) for name in SHAPE}
    try:
        config = replace(config, **shape)
        config.try_to_build()
        return config
    except ValueError as error:
        raise BadInput(f"--init_from={config.init_from}: {error}") from None


def say_unused(asked, config) -> None:
    """Says what of the shape was asked for, and is not that of config, which `take_shape` has changed. Of a
    run that is resumed it says so of what was typed alone.
    """
    unset = Config()
    unused = []
    for name in SHAPE:
        value = getattr(asked, name)
        chosen = name in typed() or not config.resume and value not in (getattr(unset, name), 0)
        if chosen and value != getattr(config, name):
            unused.append(f"{name} {value}")
    if unused:
        say(f"the shape is that of {config.init_from}; set otherwise, and not used: {', '.join(unused)}")


@torch.no_grad()
def take_weights(model: LLaMA, source: LLaMA, budget: bool) -> str:
    """Copies what both models have, and says in some lines what was taken over, what is new, what differs.

    A router or a pause embedding is taken over from a model of the same method that was trained with it, and
    its τ where a budget moves it on. A new router that is to meet a budget starts with τ above every reach.
    """
    old, new = source.state_dict(), model.state_dict()
    a, b = source.config, model.config
    kin = a.method == b.method and a.max_latent > 0
    fresh = []
    for name, weight in new.items():
        core = name.split(".")[0] in ("embed", "blocks", "norm", "head")
        if core or kin and old[name].shape == weight.shape:
            weight.copy_(old[name])
        else:
            fresh.append(name)
    lines = [f"{a.method}, {len(new) - len(fresh)} of its {len(old)} weights are taken over"]
    if fresh:
        lines.append(f"new: {', '.join(fresh)}")
    if is_adaptive(b):
        if budget and kin:
            model.tau = source.tau
            lines.append(f"τ goes on from {source.tau:.4g}")
        elif budget:
            hold_back(model)
            lines.append("τ is above every reach: no latent step at the start; the budget moves τ")
        elif kin:
            lines.append(f"τ is {model.tau:.4g}, was {source.tau:.4g}")
    if budget and "tau" in typed():
        lines.append("tau is what the budget makes it; set otherwise, and not used")
    if kin and "router_bias" in typed():
        lines.append("router_bias is that of the weights; set otherwise, and not used")
    for name in ("block_size", "max_latent", "weigh_values"):
        if getattr(a, name) != getattr(b, name):
            lines.append(f"{name} is {getattr(b, name)}, was {getattr(a, name)}")
    lines.append(f"the embedding keeps its scale, {model.scale:.4g}")
    return "\n  ".join(lines)


def hold_back(model: LLaMA) -> None:
    """Gives an untrained router its start in a trained model: r[t,1] < τ for every token, whatever it reads.

    That is so as |w · h| ≤ √d · ‖w ∘ γ‖ for a state h that the last RMSNorm, of weight γ, has put out: w is
    scaled to keep within 1, and the logit of τ lies 1 above b. So the few thoughts that τ lets in at first
    weigh what b says: too little, and nothing trains them; too much, and they harm while they are untrained.
    """
    width = math.sqrt(model.config.n_embd)
    model.router.weight /= 1.05 * width * torch.linalg.vector_norm(model.router.weight * model.norm.weight)
    model.router.bias.clamp_(-6, 6)  # where float32 tells reaches apart
    model.tau = torch.sigmoid(model.router.bias + 1).item()
