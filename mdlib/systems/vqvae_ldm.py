"""A VQ-VAE of eight-fold compression and a UNet with axial attention that denoises its latents."""

from mdlib.systems.system import System

SMALL = dict(
    block_out_channels=(48, 96), norm_num_groups=8, head_dim=16, label_dropout=0.15, attention="window_axial", window=4
)

CODEC = dict(patch_size=(2, 2), block_out_channels=(64, 128, 256), num_codes=256, code_dim=8)
UNET = dict(layers_per_block=2, norm_num_groups=32, head_dim=64, dropout=0.1, attention="window_axial", window=4)
SAMPLING = dict(guidance_scale=1.5, num_inference_steps=20)

DEMO = dict(
    codec=dict(patch_size=(4, 4), block_out_channels=(64, 128), num_codes=256, code_dim=8),
    prior=SMALL,
    sampling=SAMPLING,
    images_per_user=30,
)

SYSTEM = System(
    name="vqvae-ldm",
    codec_class="mdlib.models.vqvae:VQVAE",
    prior_class="mdlib.models.unet:LatentDiffusion",
    sizes={
        "smoke": dict(
            codec=dict(block_out_channels=(8, 8, 16), num_codes=16, code_dim=4),
            prior=dict(block_out_channels=(8, 16), norm_num_groups=4, head_dim=8, attention="window_axial", window=4),
            sampling=dict(num_inference_steps=3),
        ),
        "demo": DEMO | dict(prior_training=dict(steps=1500, ema_decay=0.99)),
        "demo-long": DEMO | dict(prior_training=dict(steps=6000, ema_decay=0.998)),
        "base": dict(codec=CODEC, prior=UNET | dict(block_out_channels=(128, 256, 384)), sampling=SAMPLING),
        # 16 heads at the widest level, by head_dim. The batch is that of one step: accumulated batches of four.
        "large": dict(
            codec=CODEC | dict(image_size=256),
            codec_training=dict(batch_size=16),
            prior=UNET | dict(block_out_channels=(256, 512, 768, 1024), gradient_checkpointing=True),
            prior_training=dict(batch_size=4, accumulation=8, learning_rate=1e-4),
            sampling=SAMPLING,
        ),
    },
    base_on={"gpu-6gb": dict(codec=dict(num_codes=128))},
)
