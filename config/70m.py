"""70M: the scale of the paper's ablations, with the recipe of its larger models."""

data = "data/pile"
out = "out/70m"
vocab_size = 50304
block_size = 2048
n_layer = 6
n_head = 8
n_embd = 512
n_ff = 1376
init_std = 0.02
max_latent = 3
budget = 1.5
tau = 0.1
lam = 0.02  # with a budget a mild price: it shapes which tokens think, not how many
beta = 2.0
global_batch_size = 256
micro_batch_size = 16
max_steps = 50000
learning_rate = 1e-3
eval_every = 1000
eval_windows = 256
save_every = 1000
log_every = 10
