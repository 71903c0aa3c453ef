"""Six layers of width 384: matrix products fill a laptop CPU. The shape of the README's cost table."""

data = "data/python"
out = "out/small"
n_layer = 6
n_head = 6
n_embd = 384
n_ff = 1024
block_size = 256
init_std = 0.032  # 1 / sqrt(2.5 d): the scaled embedding has unit RMS, as in the paper's 410M
max_latent = 3
budget = 1.4
lam = 0.02  # with a budget a mild price: it shapes which tokens think, not how many
beta = 2.0
global_batch_size = 8
max_steps = 3000
learning_rate = 2e-3
