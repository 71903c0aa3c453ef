"""Smaller than tiny.py, so that compare.py can train a hundred of them in a few hours on a laptop CPU."""

data = "data/python"
out = "out/micro"
n_layer = 3
n_head = 4
n_embd = 64
n_ff = 172
block_size = 128
init_std = 0.079  # 1 / sqrt(2.5 d): the scaled embedding has unit RMS, as in the paper's 410M
max_latent = 3
budget = 1.4
lam = 0.02  # with a budget a mild price: it shapes which tokens think, not how many
beta = 2.0
global_batch_size = 16
max_steps = 400
learning_rate = 9e-3
