"""A VQ-VAE and VQ-Diffusion, a transformer that fills in masked tokens."""

from mdlib.systems.system import System

# Guidance of 1.5 or more moves windows away from real ones. Eight mask-predict steps are as good as more, and better
# than 25 steps of the ancestral sampler.
SAMPLING = dict(sampler="mask_predict", num_inference_steps=8)

DEMO = dict(
    codec=dict(patch_size=(2, 4), block_out_channels=(32, 64), num_codes=256, code_dim=16),
    # The authors' weight is 5e-4; the bound gives most weight to states of few masks, which decide little.
    prior=dict(hidden_size=128, depth=4, num_heads=4, auxiliary_weight=0.1),
    sampling=SAMPLING,
)
TRAINING = dict(batch_size=16, learning_rate=2e-3, evaluate_every=200)

SYSTEM = System(
    name="vq-diffusion",
    codec_class="mdlib.models.vqvae:VQVAE",
    prior_class="mdlib.models.vqdiffusion:VQDiffusion",
    sizes={
        "smoke": dict(
            codec=dict(num_codes=16, code_dim=4),
            prior=dict(hidden_size=16, depth=1, num_heads=2),
            sampling=dict(num_inference_steps=3),
        ),
        "demo": DEMO | dict(prior_training=dict(steps=600, ema_decay=0.99) | TRAINING, images_per_user=20),
        "demo-long": DEMO | dict(prior_training=dict(steps=4000, ema_decay=0.998) | TRAINING, images_per_user=30),
        "base": dict(
            codec=dict(patch_size=(2, 2), block_out_channels=(64, 128, 256), num_codes=512, code_dim=32),
            prior=dict(hidden_size=384, depth=12, num_heads=6, qk_norm=True, auxiliary_weight=0.1),
            sampling=SAMPLING,
        ),
    },
    base_on={"gpu-6gb": dict(prior=dict(depth=8))},
)
