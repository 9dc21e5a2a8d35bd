"""A KL autoencoder and a UNet that denoises its latents."""

from mdlib.systems.system import System

SMALL = dict(block_out_channels=(48, 96), norm_num_groups=8, head_dim=16, label_dropout=0.15, attention="full")
SAMPLING = dict(guidance_scale=1.5, num_inference_steps=20)
CODEC = dict(patch_size=(2, 2), latent_channels=4, block_out_channels=(64, 128, 256))
UNET = dict(block_out_channels=(128, 256, 384), layers_per_block=2, norm_num_groups=32) | dict(
    head_dim=64, dropout=0.1, attention="full"
)

DEMO = dict(
    codec=dict(patch_size=(2, 4), block_out_channels=(32, 64), latent_channels=6),
    prior=SMALL,
    sampling=SAMPLING,
    images_per_user=30,  # 20 denoising steps are quick
)

SYSTEM = System(
    name="vae-diffusion",
    codec_class="mdlib.models.kl:KLVAE",
    prior_class="mdlib.models.unet:LatentDiffusion",
    sizes={
        "smoke": dict(
            codec=dict(latent_channels=2),
            prior=dict(block_out_channels=(8, 16), norm_num_groups=4, head_dim=8, attention="full"),
            sampling=dict(num_inference_steps=3),
        ),
        "demo": DEMO | dict(prior_training=dict(steps=1500, ema_decay=0.99)),
        "demo-long": DEMO | dict(prior_training=dict(steps=6000, ema_decay=0.998)),
        "base": dict(codec=CODEC, prior=UNET, sampling=SAMPLING),
        "memory-optimised": dict(
            codec=CODEC | dict(gradient_checkpointing=True),
            prior=UNET | dict(gradient_checkpointing=True),
            codec_training=dict(batch_size=8, accumulation=8),
            prior_training=dict(batch_size=8, accumulation=8),
            sampling=SAMPLING,
        ),
        "high-quality": dict(
            codec=CODEC | dict(block_out_channels=(128, 256, 512)),
            losses=dict(perceptual_weight=0.1, perceptual_net="vgg"),
            prior=UNET | dict(block_out_channels=(192, 384, 512)),
            prior_training=dict(steps=60_000, ema_decay=0.9999),
            sampling=SAMPLING | dict(num_inference_steps=50),
        ),
    },
)
