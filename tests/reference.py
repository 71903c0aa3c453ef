"""The method once more, the slow and plain way: every (t, k) is computed, and masks alone say who was
executed.

Written from METHOD.md and a state dict, sharing no line with the model. The tests hold the packed model equal
to it, in logits, steps, losses and gradients.
"""

import math

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x, pos, theta):
    """RoPE. x (B, T, H, hd) at positions (T,): the two halves of a head are the two coordinates that are
    turned.
    """
    half = x.size(-1) // 2
    angle = pos[:, None] / theta ** (torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def stack(state, config, z, see, past=(), layers=None, weight=None):
    """z (B, T, d) through the blocks, or some of them; past: keys and values of earlier passes, each a list
    over layers.

    see (B, T, S): which keys of the past passes and of this one each token sees; weight (B, T): of the values
    of this one. Returns the states before the final norm, and the keys and values of this pass.
    """
    B, T, d = z.shape
    pos = torch.arange(T)
    hd = config.head_dim or d // config.n_head

    def project(x, layer, name):
        return x @ state[f"blocks.{layer}.{name}.weight"].T + state.get(f"blocks.{layer}.{name}.bias", 0)

    def heads(x, layer, name):
        """Queries or keys (B, T, heads, hd), each head normed where the model does so, and turned."""
        x = project(x, layer, f"w{name}").view(B, T, -1, hd)
        if config.qk_norm:
            x = rms_norm(x, state[f"blocks.{layer}.{name}_norm.weight"], config.norm_eps)
        return turn(x, pos, config.rope_theta)

    kept = []
    for number, layer in enumerate(range(config.n_layer) if layers is None else layers):
        names = ("wo", "w1", "w2", "w3")
        w = {name: state[f"blocks.{layer}.{name}.weight"] for name in names}
        x = rms_norm(z, state[f"blocks.{layer}.attn_norm.weight"], config.norm_eps)
        q, k = heads(x, layer, "q"), heads(x, layer, "k")
        v = project(x, layer, "wv").view(B, T, -1, hd)
        if weight is not None:
            v = v * weight[..., None, None]
        kept.append((k, v))
        keys = torch.cat([*(layers_of[number][0] for layers_of in past), k], 1)
        values = torch.cat([*(layers_of[number][1] for layers_of in past), v], 1)
        shared = config.n_head // keys.size(2)  # heads that share a head of keys and values
        keys, values = keys.repeat_interleave(shared, 2), values.repeat_interleave(shared, 2)
        score = torch.einsum("bqhd,bkhd->bhqk", q, keys) / math.sqrt(hd)
        share = score.masked_fill(~see[:, None], -math.inf).softmax(-1)
        z = z + torch.einsum("bhqk,bkhd->bqhd", share, values).reshape(B, T, -1) @ w["wo"].T
        x = rms_norm(z, state[f"blocks.{layer}.ffn_norm.weight"], config.norm_eps)
        z = z + (F.silu(x @ w["w1"].T) * (x @ w["w3"].T)) @ w["w2"].T
    return z, kept


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


def head(state, config, z):
    return rms_norm(z, state["norm.weight"], config.norm_eps) @ state["head.weight"].T


def vanilla(state, config, idx):
    """Logits (B, T, V)."""
    B, T = idx.shape
    z, _ = stack(state, config, state["embed.weight"][idx], causal(T).expand(B, T, T))
    return head(state, config, z)


def adaptive(state, config, idx, exits=None):
    """Logits (B, T, V), executed steps (B, T), reach (B, T, ℓ_max) of steps taken and of the first refused,
    expected steps (B, T) (METHOD.md §1 to §3). exits: a list that takes of each column what the head reads in
    every h[t,k] (B, T, V), and which are executed (B, T).
    """
    B, T = idx.shape
    z = math.sqrt(2.5 * config.n_embd) * state["embed.weight"][idx]
    reach, executed = torch.ones(B, T), torch.ones(B, T, dtype=torch.bool)
    mixture, steps, expected = 0, torch.zeros(B, T), torch.zeros(B, T)
    past, seen, asked = [], [], []
    for k in range(config.max_latent + 1):
        seen.append(executed[:, None, :] & causal(T))
        mine = seen[-1] | torch.eye(T, dtype=torch.bool)  # a halted query sees itself, so that nothing is NaN
        see = torch.cat([*seen[:-1], mine], 2)
        z, kept = stack(state, config, z, see, past, weight=reach if config.weigh_values else None)
        past.append(kept)
        h = z = rms_norm(z, state["norm.weight"], config.norm_eps)
        if exits is not None:
            exits.append((h @ state["head.weight"].T, executed))
        onward = reach * torch.sigmoid(h @ state["router.weight"][0] + state["router.bias"])
        further = executed & (onward >= config.tau) & (k < config.max_latent)
        asked.append(torch.where(executed, onward, 0.0))
        mass = torch.where(executed, torch.where(further, reach - onward, reach), 0.0)
        mixture = mixture + mass[..., None] * h
        reach, executed = torch.where(further, onward, 0.0), further
        steps, expected = steps + further, expected + reach
    return mixture @ state["head.weight"].T, steps, torch.stack(asked[: config.max_latent], 2), expected


def loss(logits, expected, targets, config, exits=()):
    """METHOD.md §4."""
    nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    q = torch.exp(-nats.detach())
    total = nats.mean() + config.lam * (q**config.beta * expected).mean()
    for said, executed in exits:
        nats = F.cross_entropy(said.transpose(1, 2), targets, reduction="none")
        total = total + config.exit_loss / (config.max_latent + 1) * (nats * executed).mean()
    return total


def mor(state, config, idx):
    """Logits (B, T, V) and depths (B, T): every recursion for all tokens; the depth that a token chose says
    what counts.
    """
    B, T = idx.shape
    everyone = causal(T).expand(B, T, T)
    first, _ = stack(state, config, state["embed.weight"][idx], everyone, layers=[0])
    g = (first @ state["router.weight"].T).softmax(-1)
    depth, h, done = g.argmax(-1), first, torch.zeros_like(first)
    for r in range(config.max_latent + 1):
        see = (depth >= r)[:, None, :] & causal(T) | torch.eye(T, dtype=torch.bool)
        h = g[..., r : r + 1] * stack(state, config, h, see, layers=range(1, config.n_layer - 1))[0]
        done = torch.where((depth == r)[..., None], h + first, done)
    last, _ = stack(state, config, done, everyone, layers=[config.n_layer - 1])
    return head(state, config, last), depth
