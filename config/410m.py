"""The paper's 410M:

    torchrun --nproc_per_node=8 train.py config/410m.py    256 × 2048 tokens a step, 50,000 steps
"""

data = "data/pile"
out = "out/410m"
vocab_size = 50304
block_size = 2048
n_layer = 24
n_head = 16
n_embd = 1024
n_ff = 2752
init_std = 0.02
max_latent = 3
budget = 2.55  # the paper's 410M: 3.55 mean passes of 4
tau = 0.1
lam = 0.02  # with a budget a mild price: it shapes which tokens think, not how many
beta = 2.0
global_batch_size = 256
micro_batch_size = 4  # 60 GB where all steps are taken; 8 would be 110
max_steps = 50000
learning_rate = 3e-4
eval_every = 1000
eval_windows = 256
save_every = 1000
log_every = 10
