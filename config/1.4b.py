"""The paper's 1.4B:

    torchrun --nproc_per_node=8 train.py config/1.4b.py    256 × 2048 tokens a step, 50,000 steps
"""

data = "data/pile"
out = "out/1.4b"
vocab_size = 50304
block_size = 2048
n_layer = 24
n_head = 32
n_embd = 2048
n_ff = 5504
init_std = 0.01
max_latent = 3
budget = 2.43  # the paper's 1.4B: 3.43 mean passes of 4
tau = 0.1
lam = 0.02  # with a budget a mild price: it shapes which tokens think, not how many
beta = 2.0
global_batch_size = 256
micro_batch_size = 4
checkpointing = True
max_steps = 50000
learning_rate = 2e-4
eval_every = 1000
eval_windows = 256
save_every = 1000
log_every = 10
