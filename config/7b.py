"""7B with grouped-query attention, sharded:

    torchrun --nproc_per_node=8 train.py config/7b.py    256 × 2048 tokens a step
"""

data = "data/pile"
out = "out/7b"
vocab_size = 50304
block_size = 2048
n_layer = 32
n_head = 32
n_kv_head = 8
n_embd = 4096
n_ff = 14336
init_std = 0.01
max_latent = 3
budget = 2.43  # that of the paper's 1.4B, its largest
tau = 0.1
lam = 0.02  # with a budget a mild price: it shapes which tokens think, not how many
beta = 2.0
global_batch_size = 256
micro_batch_size = 4
shard = True
checkpointing = True
max_steps = 50000
learning_rate = 1.2e-4  # Pythia's of 6.9B
eval_every = 1000
eval_windows = 256
save_every = 1000
log_every = 10
