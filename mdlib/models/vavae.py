"""VA-VAE (Yao et al. 2025): a KL autoencoder whose latents are aligned with the features of a frozen vision model, so
that a prior learns them sooner at the same reconstruction."""

from diffusers import ModelMixin

from mdlib.models.kl import KLVAE


class VAVAE(KLVAE, ModelMixin):  # ModelMixin by name: diffusers looks for it in this module when it loads
    """`KLVAE`, trained with `Alignment` and optionally with `Adversary` (`mdlib.models.codec_losses`)."""

    aligned = True
    _keys_to_ignore_on_load_unexpected = [r"projection\.weight", r"discriminator\..*", "batches"]  # saved by mdlib 0.1
