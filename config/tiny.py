"""A model for a laptop CPU: bytes of the Python standard library, minutes of training. The default of train.py."""

data = "data/python"
out = "out/tiny"
n_layer = 4
n_head = 4
n_embd = 128
n_ff = 344
block_size = 256
max_latent = 3
budget = 1.4
router_bias = 0.0
tau = 0.1
beta = 1.0
global_batch_size = 8
max_steps = 1000
learning_rate = 2e-3
