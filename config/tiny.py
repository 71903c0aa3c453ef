"""A model for a laptop CPU: bytes of the Python standard library, in minutes. The default of train.py."""

data = "data/python"
out = "out/tiny"
n_layer = 3
n_head = 4
n_embd = 128
n_ff = 344
block_size = 256
init_std = 0.056  # 1 / sqrt(2.5 d): the scaled embedding has unit RMS, as in the paper's 410M
max_latent = 3
budget = 1.4
tau = 0.1
lam = 0.02  # with a budget a mild price: it shapes which tokens think, not how many
beta = 2.0
global_batch_size = 8
max_steps = 800
learning_rate = 4e-3
