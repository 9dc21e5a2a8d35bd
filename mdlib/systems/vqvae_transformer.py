"""A VQ-VAE and a causal transformer over its tokens."""

from mdlib.systems.system import System

DEMO = dict(
    # 1.5× the width gains 0.2 dB at equal steps, but loses identity accuracy at equal time.
    codec=dict(patch_size=(2, 4), block_out_channels=(32, 64), num_codes=256, code_dim=16),
    prior=dict(hidden_size=128, num_layers=4, num_heads=4),
    # top_p cuts off the tail of the distribution, because guidance turns rare tokens into blobs.
    sampling=dict(guidance_scale=1.5, top_p=0.95),
)

SYSTEM = System(
    name="vqvae-transformer",
    codec_class="mdlib.models.vqvae:VQVAE",
    prior_class="mdlib.models.transformer:TokenPrior",
    notebooks=("01_env_check", "02_train_vqvae", "03_train_prior", "05_generate", "06_validate"),
    sizes={
        "smoke": dict(
            codec=dict(num_codes=16, code_dim=4),
            prior=dict(hidden_size=16, num_layers=1, num_heads=2),
            prior_training=dict(ema_decay=0.0),
        ),
        "demo": DEMO
        | dict(
            # With so few windows the held-out loss soon rises again while samples still gain identity: the last
            # weights are used, and the report checks for copies.
            prior_training=dict(steps=500, learning_rate=2e-3, weight_decay=0.05)
        ),
        "demo-long": DEMO | dict(prior_training=dict(steps=2000, learning_rate=2e-3, weight_decay=0.05)),
        "base": dict(
            codec=dict(patch_size=(2, 2), block_out_channels=(64, 128, 256), num_codes=512, code_dim=32),
            prior=dict(hidden_size=384, num_layers=8, num_heads=6, dropout=0.2),
            prior_training=dict(
                steps=8000,
                learning_rate=3e-4,
                warmup_steps=200,
                weight_decay=0.05,
                ema_decay=0.999,
                evaluate_every=250,
                keep_best=True,
            ),
        ),
    },
)
