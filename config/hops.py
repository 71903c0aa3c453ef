"""Two layers on tables of permutations (prepare.py --task=hops): how far do they follow, thinking or not?

All tokens take all steps; results/README.md has the training that follows, in which the router chooses.
Without: --method=vanilla --max_latent=0.
"""

data = "data/hops"
out = "out/hops"
n_layer = 2
n_head = 2
n_embd = 64
n_ff = 176
block_size = 60  # a document, less the token that is only predicted
init_std = 0.079  # 1 / sqrt(2.5 d): the scaled embedding has unit RMS
max_latent = 3
budget = None
tau = 0.0  # every step is taken
lam = 0.0
global_batch_size = 16
max_steps = 12000
learning_rate = 2e-3
