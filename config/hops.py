"""Two layers on tables of permutations (prepare.py --task=hops): how far do they follow, thinking or not?"""

data = "data/hops"
out = "out/hops"
n_layer = 2
n_head = 4
n_embd = 128
n_ff = 344
block_size = 256
init_std = 0.056  # 1 / sqrt(2.5 d): the scaled embedding has unit RMS
max_latent = 3
budget = 0.5  # of all tokens; a question is one in four
lam = 0.02
beta = 2.0
global_batch_size = 16
max_steps = 3000
learning_rate = 2e-3
