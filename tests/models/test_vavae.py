"""VA-VAE: alignment by hand, weights that follow gradients, an adversary kept apart, users, stages, exact resume."""

import pytest
import torch
import torch.nn.functional as F
from test_vae import pictures
from torch import nn

from mdlib.models.kl import KLVAE
from mdlib.models.vavae import RECIPE, VAVAE, PatchGAN, cosine_loss, distance_loss
from mdlib.training.fit import Batches, TrainConfig, fit
from mdlib.training.latents import decode_all, encode_all

SMALL = dict(image_size=16, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, mid_attention=False)
ADVERSARY = dict(adversarial_weight=0.5, discriminator_width=8, discriminator_layers=2)


class Foundation(nn.Module):
    """A fixed map of the image: eight random 5×5 filters."""

    width = 8

    def __init__(self):
        super().__init__()
        self.filters = nn.Parameter(torch.randn(8, 1, 5, 5, generator=torch.Generator().manual_seed(1)) / 5)

    def features(self, images, grid):
        return F.adaptive_avg_pool2d(F.conv2d(images, self.filters, padding=2).tanh(), grid).detach()


class Likeness(nn.Module):
    def forward(self, outputs, images):
        return (outputs - images).square().mean((1, 2, 3))


def small_codec(aligned: bool = False, **changes) -> VAVAE:
    torch.manual_seed(0)
    codec = VAVAE(**{**SMALL, "foundation_width": 8 * aligned, **changes}).eval()
    if aligned:
        codec.align_to(Foundation())
    return codec


def gradients(loss: torch.Tensor, *parameters: nn.Parameter) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, parameters, retain_graph=True)


# Alignment ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_the_alignment_losses_are_their_sums_over_positions(margin):
    torch.manual_seed(0)
    z, f = torch.randn(2, 2, 5, 3, 2)  # (B, F, h, w) each
    cosine = lambda a, b: float(a @ b / (a.norm() * b.norm()))
    positions = [(row, column) for row in range(3) for column in range(2)]
    single, pairs = [], []
    for window in range(2):
        for i in positions:
            zi, fi = z[window][:, *i], f[window][:, *i]
            single.append(max(0.0, 1 - margin - cosine(zi, fi)))
            for j in positions:
                zj, fj = z[window][:, *j], f[window][:, *j]
                pairs.append(max(0.0, abs(cosine(zi, zj) - cosine(fi, fj)) - margin))
    assert float(cosine_loss(z, f, margin)) == pytest.approx(sum(single) / len(single), abs=1e-6)
    assert float(distance_loss(z, f, margin)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_without_its_options_it_is_the_kl_codec():
    torch.manual_seed(0)
    plain, codec, images = KLVAE(**SMALL).eval(), small_codec(), pictures(4)
    assert plain.state_dict().keys() == codec.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), codec.parameters(), strict=True))
    assert codec.loss(images)[0] == plain.loss(images)[0]
    assert torch.equal(codec.decode(codec.encode(images)), plain.decode(plain.encode(images)))
    assert not codec.conditional and not plain.conditional


def test_the_alignments_gradient_is_its_weight_times_the_reconstructions():
    codec, images = small_codec(True, kl_weight=0.0, alignment_weight=0.3), pictures(4)
    layer = codec.vae.encoder.conv_out.weight
    with_alignment = gradients(codec.loss(images)[0], layer)[0]
    codec.configure(alignment_weight=0.0)
    alone = gradients(codec.loss(images)[0], layer)[0]
    assert float((with_alignment - alone).norm() / alone.norm()) == pytest.approx(0.3, rel=1e-3)


def test_the_adaptive_weight_follows_the_reconstructions_scale():
    codec, images = small_codec(True, **ADVERSARY), pictures(4)
    before = codec.loss(images)[1]
    codec.add_teacher("likeness", Likeness(), 999.0)  # with it the reconstruction is 1000 times itself
    after = codec.loss(images)[1]
    for name in ("align_weight", "generator_weight"):
        assert float(after[name] / before[name]) == pytest.approx(1000, rel=1e-3)
    codec.configure(adaptive=False)
    assert codec.loss(images)[1]["align_weight"] == 0.5


def test_an_alignment_within_its_margins_leaves_the_training_alone():
    codec, images = small_codec(True, cosine_margin=2.0, distance_margin=2.0), pictures(4)
    loss, logs = codec.loss(images)
    assert logs["align_cosine"] == logs["align_distance"] == 0
    torch.testing.assert_close(loss, small_codec().loss(images)[0])
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in codec.parameters())


def test_an_alignment_that_is_all_but_met_is_not_blown_up():
    codec, images = small_codec(True, kl_weight=0.0), pictures(4)
    with torch.no_grad():  # latents that hardly follow the encoder: neither do the terms
        codec.vae.quant_conv.weight.mul_(1e-6)
        codec.vae.quant_conv.bias[:4] = 1.0
    layer = codec.vae.encoder.conv_out.weight
    with_alignment = gradients(codec.loss(images)[0], layer)[0]
    codec.configure(alignment_weight=0.0)
    alone = gradients(codec.loss(images)[0], layer)[0]
    assert (with_alignment - alone).norm() < 0.1 * alone.norm()


def test_half_precision_does_not_lose_the_weight():
    codec, images = small_codec(True, patch_size=(4, 4)), 1e-3 * pictures(128)
    with torch.no_grad():  # a mean over so many small errors has gradients below float16's smallest
        for parameter in codec.vae.decoder.conv_out.parameters():
            parameter.mul_(0.01)
    exact = codec.loss(images)[1]["align_weight"]
    with torch.autocast("cpu", dtype=torch.float16):
        assert float(codec.loss(images)[1]["align_weight"]) == pytest.approx(float(exact), rel=0.1)
        codec.add_teacher("likeness", Likeness(), 1e15)  # and one beyond its largest
        loss, logs = codec.loss(images)
        assert logs["align_weight"] == 0 and loss.isfinite()


def test_checkpointed_activations_change_neither_weights_nor_gradients():
    found = []
    for checkpointing in (False, True):
        codec = small_codec(True, gradient_checkpointing=checkpointing, **ADVERSARY)
        loss, logs = codec.loss(pictures(2))
        loss.backward()
        found.append([logs["align_weight"], *(parameter.grad for parameter in codec.parameters())])
    torch.testing.assert_close(found[1], found[0])


def trained(codec: VAVAE, images: torch.Tensor, steps: int) -> dict[str, float]:
    """The held-out logs after some steps on `images`."""
    optimizer = torch.optim.AdamW(codec.train().parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        torch.manual_seed(step)
        loss, _ = codec.loss(images[torch.randint(len(images), (16,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return codec.eval().loss(images)[1]


def test_latents_take_the_foundations_shape_at_little_cost():
    sizes = dict(patch_size=(2, 2), block_out_channels=(16, 16), latent_channels=8)
    images, aligned = pictures(64), small_codec(True, alignment_weight=0.25, **sizes)
    with torch.no_grad():
        before = aligned.loss(images)[1]
    plain, after = trained(small_codec(**sizes), images, 80), trained(aligned, images, 80)
    assert after["align_cosine"] < before["align_cosine"] / 2
    assert after["align_distance"] < before["align_distance"] / 2
    assert after["psnr_db"] > plain["psnr_db"] - 1


def test_the_foundation_is_neither_trained_nor_saved(tmp_path):
    codec, images = small_codec(True), pictures(4)
    foundation = codec._foundation[0]
    names = set(codec.state_dict())
    assert names - set(small_codec().state_dict()) == {"projection.weight"}
    assert all(parameter is not foundation.filters for parameter in codec.parameters())
    codec.calibrate(images)
    codec.save_pretrained(tmp_path)
    again = VAVAE.from_pretrained(tmp_path).eval()
    assert set(again.state_dict()) == names
    assert torch.equal(again.encode(images), codec.encode(images))
    with torch.no_grad():
        assert again.loss(images)[0] == codec.loss(images)[0]
        assert "align_cosine" in codec.loss(images)[1]
    with pytest.raises(ValueError, match=r"^alignment needs a foundation: call align_to.* or set alignment_weight=0$"):
        again.train().loss(images)


def test_a_foundation_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"features are 8 wide, the codec was built with foundation_width=0: build"):
        small_codec().align_to(Foundation())


def test_a_held_out_loss_is_the_kl_codecs():
    codec, images = small_codec(True, **ADVERSARY), pictures(4)
    with torch.no_grad():
        loss, logs = codec.loss(images)
        torch.testing.assert_close(loss, small_codec().loss(images)[0])
    assert {"align_cosine", "align_distance"} <= logs.keys()
    assert codec.batches == 0


# The adversary -----------------------------------------------------------------------------------------------------


def test_each_opponent_learns_from_its_own_loss_only():
    codec, images = small_codec(kl_weight=0.0, **ADVERSARY), pictures(4)
    loss, logs = codec.loss(images)
    loss.backward()
    output = codec.vae(images).sample  # `decode` would clip it
    real, made = codec.discriminator(images), codec.discriminator(output.detach())
    hinge = ((1 - real).relu().mean() + (1 + made).relu().mean()) / 2
    torch.testing.assert_close(logs["discriminator"], hinge.detach())
    apart = list(codec.discriminator.parameters())
    torch.testing.assert_close([p.grad for p in apart], gradients(hinge, *apart), atol=1e-6, rtol=1e-4)
    rest = list(codec.vae.parameters())
    generator = -codec.discriminator(output).mean()
    last = codec.vae.decoder.conv_out.weight
    mse = F.mse_loss(output, images)
    weight = 0.5 * gradients(mse, last)[0].norm() / gradients(generator, last)[0].norm()
    torch.testing.assert_close(logs["generator_weight"], weight)
    wanted = gradients(mse + weight * generator, *rest)
    torch.testing.assert_close([p.grad for p in rest], list(wanted), atol=1e-6, rtol=1e-3)


def test_the_discriminator_waits_for_its_batch():
    codec, images = small_codec(adversarial_start=2, **ADVERSARY).train(), pictures(4)
    acted = ["discriminator" in codec.loss(images)[1] for _ in range(4)]
    assert acted == [False, False, True, True]
    codec.eval()
    codec.loss(images)
    assert codec.batches == 4


def test_the_discriminator_learns_to_tell_noise_from_pictures():
    torch.manual_seed(0)
    judge = PatchGAN(1, width=8, layers=2)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, betas=(0.5, 0.9))
    real, made = pictures(32), pictures(32) + 0.3 * torch.randn(32, 1, 16, 16)
    for _ in range(60):
        loss = (1 - judge(real)).relu().mean() + (1 + judge(made)).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert judge(real).mean() > 0.5 and judge(made).mean() < -0.5
    one, many = judge(real[:1]), judge(real)
    torch.testing.assert_close(one, many[:1])  # no window's verdict depends on its batch


def test_a_resumed_run_with_a_discriminator_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path):
    config = TrainConfig(
        steps=6, batch_size=4, warmup_steps=1, ema_decay=0.9, evaluate_every=2, save_every=2, tracker="none"
    )
    options = dict(adversarial_start=1, num_users=2, **ADVERSARY)
    data = Batches((pictures(12), torch.arange(12) % 2))

    def run(folder, preview=None):
        codec = small_codec(True, **options)
        fit(codec, data, config, tmp_path / folder, held_out=data, preview=preview, progress=False)
        return codec

    class Stop(Exception):
        pass

    def stop(codec, step):
        if step == 4:
            raise Stop

    whole = run("whole")
    with pytest.raises(Stop):
        run("broken", stop)
    resumed = run("broken")
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert whole.batches == 6
    first = small_codec(True, **options).discriminator[0].weight
    assert not torch.equal(whole.discriminator[0].weight, first)


def test_the_discriminator_has_its_own_moments_and_nothing_is_lost_between_the_groups():
    codec = small_codec(True, num_users=2, **ADVERSARY)
    groups = codec.parameter_groups()
    assert groups[1]["betas"] == (0.5, 0.9) and len(groups[1]["params"]) == len(list(codec.discriminator.parameters()))
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in codec.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(codec.parameters()))
    assert len(small_codec(True).parameter_groups()) == 1


def test_a_discriminator_deeper_than_the_image_is_refused():
    with pytest.raises(ValueError, match="^discriminator_layers 3 is too many for 16 pixels$"):
        small_codec(adversarial_weight=0.5)


# Users -------------------------------------------------------------------------------------------------------------


def user_codec(**changes) -> VAVAE:
    """A codec of three users whose vectors are not zero any more."""
    codec = small_codec(num_users=3, **changes)
    for layer in (codec.encoder_shift, codec.decoder_shift):
        nn.init.normal_(layer.weight)
    return codec


@torch.no_grad()
def test_it_begins_as_a_codec_of_no_users():
    codec, plain, images, users = small_codec(num_users=3), small_codec(), pictures(4), torch.tensor([0, 1, 2, 3])
    assert codec.conditional
    assert torch.equal(codec.encode(images, users), plain.encode(images))
    assert torch.equal(codec.decode(codec.encode(images), users), plain.decode(plain.encode(images)))


@torch.no_grad()
def test_no_label_is_the_null_label_and_users_differ():
    codec, images = user_codec(), pictures(4)
    null, other = torch.full((4,), 3), torch.full((4,), 1)
    latents = codec.encode(images)
    assert torch.equal(codec.encode(images, null), latents)
    assert torch.equal(codec.decode(latents, null), codec.decode(latents))
    assert codec.loss(images, null)[0] == codec.loss(images)[0]
    assert not torch.allclose(codec.encode(images, other), latents)
    assert not torch.allclose(codec.decode(latents, other), codec.decode(latents))
    mixed = codec.encode(images, torch.tensor([3, 3, 1, 3]))
    torch.testing.assert_close(mixed[2:3], codec.encode(images[2:3], other[:1]))
    torch.testing.assert_close(mixed[:2], latents[:2])


def test_labels_are_dropped_in_training_only():
    codec, images, users = user_codec(label_dropout=1.0), pictures(4), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        assert codec.loss(images, users)[0] != codec.loss(images)[0]
    losses = []
    for labels in (users, None):
        torch.manual_seed(0)
        torch.rand(4) if labels is None else None  # what the dropout draws
        losses.append(codec.train().loss(images, labels)[0])
    assert losses[0] == losses[1]


def test_labels_reach_calibration_and_whole_sets(tmp_path):
    codec = user_codec()
    windows = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8)
    images, users = windows / 127.5 - 1, torch.tensor([0, 1, 2, 0, 1, 2, 0])
    codec.calibrate(images, users, batch_size=3)
    latents = encode_all(codec, windows, "latents", tmp_path, batch_size=3, labels=users)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(latents, codec.encode(images, users))
        decoded = decode_all(codec, latents, batch_size=2, labels=users)
        torch.testing.assert_close(decoded, codec.decode(latents, users))
        unlabelled = encode_all(codec, windows, "latents", tmp_path)
        torch.testing.assert_close(unlabelled, codec.encode(images))
    assert len(list(tmp_path.iterdir())) == 2


def test_labels_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"^labels must lie in 0…3, got 4…4$"):
        user_codec().encode(pictures(1), torch.tensor([4]))


# Stages ------------------------------------------------------------------------------------------------------------


def test_the_recipes_stages_change_the_loss_and_the_saved_configuration(tmp_path):
    codec, images = small_codec(True, adversarial_start=9, **ADVERSARY), pictures(4)
    assert sum(share for share, _ in RECIPE) == pytest.approx(1)
    for _, options in RECIPE:
        codec.configure(**options)
        assert options.items() <= codec.config.items()
    logs = codec.loss(images)[1]
    codec.configure(cosine_margin=0.0)
    assert logs["align_cosine"] < codec.loss(images)[1]["align_cosine"]
    codec.save_pretrained(tmp_path)
    assert VAVAE.from_pretrained(tmp_path).config.distance_margin == 0.25


@pytest.mark.parametrize(
    "options, line",
    [
        (dict(latent_channels=8), "^cannot change latent_channels: only kl_weight, alignment_weight"),
        (dict(adversarial_weight=0.5), "^adversarial_weight 0 builds no discriminator: it cannot change"),
    ],
)
def test_what_is_built_cannot_be_configured(options, line):
    codec = small_codec()
    with pytest.raises(ValueError, match=line):
        codec.configure(**options)
    assert codec.config.latent_channels == 4 and codec.config.adversarial_weight == 0
