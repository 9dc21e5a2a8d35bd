"""A VA-VAE, whose latents are aligned with a frozen network, and a LightningDiT trained by flow matching."""

from mdlib.systems.system import System

# The authors' three stages: fraction of the codec's steps, and options of its losses.
STAGES = (
    (100 / 130, dict(alignment_weight=0.5, distance_margin=0.0, cosine_margin=0.0, adversarial_start=0)),
    (15 / 130, dict(alignment_weight=0.1, distance_margin=0.0, cosine_margin=0.0, adversarial_start=0)),
    (15 / 130, dict(alignment_weight=0.1, distance_margin=0.25, cosine_margin=0.5, adversarial_start=0)),
)
GPU = dict(
    losses=dict(adversarial_weight=0.5),
    prior_training=dict(learning_rate=1e-4, beta2=0.95),
    sampling=dict(guidance_scale=1.5, num_inference_steps=25),
    foundation="facebook/dinov2-large",
    stages=STAGES,
)
DIT_B = dict(hidden_size=768, depth=12, num_heads=12, patch_size=1)

DEMO = dict(
    codec=dict(patch_size=(4, 4), block_out_channels=(64, 128), latent_channels=16),
    prior=dict(patch_size=1, hidden_size=128, depth=6, num_heads=4, label_dropout=0.15),
    sampling=dict(guidance_scale=1.5, scheduler="euler", num_inference_steps=20),
    foundation="classifier",
    images_per_user=30,
)

SYSTEM = System(
    name="vavae-dit",
    codec_class="mdlib.models.kl:VAVAE",
    prior_class="mdlib.models.dit:LightningDiT",
    sizes={
        "smoke": dict(
            codec=dict(latent_channels=4),
            losses=dict(adversarial_weight=0.5, discriminator_width=8, discriminator_layers=2),
            prior=dict(patch_size=2, hidden_size=16, depth=2, num_heads=2),
            sampling=dict(guidance_scale=1.5, num_inference_steps=3),
            foundation="classifier",
            stages=tuple((1 / 3, options) for _, options in STAGES),
        ),
        # On a CPU the first stage alone, without an adversary.
        "demo": DEMO | dict(prior_training=dict(steps=800, learning_rate=2e-3, ema_decay=0.99)),
        "demo-long": DEMO | dict(prior_training=dict(steps=4000, learning_rate=2e-3, ema_decay=0.998)),
        "base": GPU
        | dict(
            codec=dict(patch_size=(2, 2), block_out_channels=(64, 128, 256), latent_channels=16, reconstruction="l1"),
            prior=DIT_B | dict(qk_norm=True, gradient_checkpointing=False),
        ),
        # The sizes of the published VA-VAE, for `codec_start`.
        "f16d32": GPU
        | dict(
            codec=dict(
                image_size=256,
                block_out_channels=(128, 128, 256, 256, 512),
                latent_channels=32,
                level_attention=True,
                reconstruction="l1",
                gradient_checkpointing=True,
            ),
            codec_training=dict(learning_rate=1e-4, batch_size=4, accumulation=4),
            prior=DIT_B | dict(qk_norm=False, gradient_checkpointing=True),
        ),
    },
    base_on={
        "gpu-6gb": dict(prior=dict(hidden_size=384, depth=12, num_heads=6, gradient_checkpointing=True)),
        "gpu-8gb": dict(prior=dict(hidden_size=384, depth=12, num_heads=6)),
        "p100": dict(prior=dict(gradient_checkpointing=True)),  # in float32 a batch of 64 would take 17 GB
    },
)
