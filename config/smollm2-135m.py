"""SmolLM2-135M, taught to think; the shape is the checkpoint's. First import it, and prepare text with it:

    python hf.py import path/to/SmolLM2-135M out/smollm2
    python prepare.py --tokenizer=out/smollm2 --input FILES --name=smollm2
"""

data = "data/smollm2"
out = "out/smollm2-adaptive"
init_from = "out/smollm2"
method = "adaptive"
block_size = 2048
max_latent = 3
budget = 1.0
lam = 0.02
router_bias = -1.0  # reach 0.27: thoughts that nothing has trained yet must not weigh much
beta = 2.0
global_batch_size = 64
micro_batch_size = 8
max_steps = 2000
learning_rate = 2e-4  # low: what it knows is not to be lost
eval_every = 100
save_every = 200
log_every = 10
