"""Losses attached to a codec: distances, alignment by hand, adaptive weights, an adversary that learns separately,
stages of training, exact resume, and that none of it is saved with the codec."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_kl import pictures
from torch import nn

from mdlib.evaluation.evidence import trained_once
from mdlib.models.classifier import SmallCNN
from mdlib.models.codec import (
    Adversary,
    Alignment,
    Distance,
    FeatureDistance,
    PatchGAN,
    cosine_loss,
    distance_loss,
)
from mdlib.models.kl import KLVAE, VAVAE
from mdlib.models.vqvae import VQVAE
from mdlib.training.fit import Batches, TrainConfig, fit

SMALL = dict(image_size=16, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4)
VQ_SMALL = dict(image_size=32, block_out_channels=(8, 8), norm_num_groups=4, num_codes=8, code_dim=4)


class Foundation(nn.Module):
    """A fixed map of the image: eight random 5×5 filters."""

    width = 8

    def __init__(self):
        super().__init__()
        self.filters = nn.Parameter(torch.randn(8, 1, 5, 5, generator=torch.Generator().manual_seed(1)) / 5)

    def features(self, images, grid):
        return F.adaptive_avg_pool2d(F.conv2d(images, self.filters, padding=2).tanh(), grid).detach()


class Likeness(nn.Module):
    """A network with a weight of its own: mean square of the difference, times that weight."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, outputs, images):
        return self.scale * (outputs - images).square().mean((1, 2, 3))  # (B,)


def small_codec(alignment: dict | None = None, adversary: dict | None = None, **changes) -> VAVAE:
    """A codec with the losses whose options are given."""
    torch.manual_seed(0)
    codec = VAVAE(**{**SMALL, **changes}).eval()
    if alignment is not None:
        codec.attach(Alignment(Foundation(), 8 if "latent_channels" in changes else 4, **alignment).eval())
    if adversary is not None:
        codec.attach(Adversary(1, 16, discriminator_width=8, discriminator_layers=2, **adversary).eval())
    return codec


def gradients(loss: torch.Tensor, *parameters: nn.Parameter) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, parameters, retain_graph=True)


def test_a_va_vae_is_the_kl_codec():
    torch.manual_seed(0)
    plain, codec, images = KLVAE(**SMALL).eval(), small_codec(), pictures(4)
    assert plain.state_dict().keys() == codec.state_dict().keys()
    assert codec.loss(images)[0] == plain.loss(images)[0]


# Distances ---------------------------------------------------------------------------------------------------------


def test_a_distance_adds_to_the_loss_and_is_neither_trained_nor_saved(tmp_path):
    codec, images, network = small_codec(), pictures(4), Likeness(3.0)
    plain, before = codec.loss(images)[0], set(codec.state_dict())
    codec.attach(Distance("similarity", network, 0.5))
    loss, logs = codec.loss(images)
    torch.testing.assert_close(logs["similarity"], 3 * logs["mse"])
    torch.testing.assert_close(loss, plain + 0.5 * logs["similarity"])
    loss.backward()
    assert network.scale.grad is None and not any(parameter is network.scale for parameter in codec.parameters())
    codec.save_pretrained(tmp_path)
    again = VAVAE.from_pretrained(tmp_path).eval()
    assert set(again.state_dict()) == before
    torch.testing.assert_close(again.loss(images)[0], plain)


def test_the_teachers_distance_is_zero_for_the_same_and_trains_outputs_only():
    torch.manual_seed(0)
    distance = FeatureDistance(SmallCNN(3))
    images = torch.rand(4, 1, 32, 32) * 2 - 1
    outputs = (images + 0.2 * torch.randn_like(images)).requires_grad_()
    assert float(distance(images, images)) == 0
    distance(outputs, images).backward()
    assert outputs.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in distance.parameters())


def test_speckle_costs_less_than_a_moved_ridge():
    torch.manual_seed(0)
    distance = FeatureDistance(SmallCNN(3))
    rows = torch.arange(32.0).view(1, 1, 32, 1)
    ridge = lambda row: (2 * torch.exp(-((rows - row) ** 2) / 8) - 1).expand(4, 1, 32, 32)
    moved = ridge(19.0) - ridge(16.0)
    speckle = torch.randn(4, 1, 32, 32)
    speckle = speckle * moved.square().mean().sqrt() / speckle.square().mean().sqrt()
    assert distance(ridge(16.0) + speckle, ridge(16.0)) < 0.7 * distance(ridge(16.0) + moved, ridge(16.0))


def test_a_stored_teacher_is_not_trained_again(tmp_path, monkeypatch):
    images, users = torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8), torch.arange(8) % 2
    arguments = (SmallCNN, tmp_path / "teacher", images, users, 2, 3, 0)
    first = FeatureDistance(trained_once(*arguments))
    monkeypatch.setattr("mdlib.evaluation.evidence.train_classifier", lambda *arguments, **options: 1 / 0)
    state = torch.get_rng_state()
    again = FeatureDistance(trained_once(*arguments))
    assert torch.equal(torch.get_rng_state(), state)
    one, other = torch.rand(2, 4, 1, 32, 32) * 2 - 1
    assert torch.equal(first(one, other), again(one, other))


def test_a_vq_codec_takes_a_teacher():
    codec = VQVAE(**VQ_SMALL).eval()
    plain, _ = codec.loss(torch.zeros(2, 1, 32, 32))
    codec.attach(Distance("teacher", FeatureDistance(SmallCNN(3)), 0.5))
    total, logs = codec.loss(torch.zeros(2, 1, 32, 32))
    torch.testing.assert_close(total, plain + 0.5 * logs["teacher"])


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


def test_the_alignments_gradient_is_its_weight_times_the_reconstructions():
    codec, images = small_codec(dict(alignment_weight=0.3), kl_weight=0.0), pictures(4)
    layer = codec.vae.encoder.conv_out.weight
    with_alignment = gradients(codec.loss(images)[0], layer)[0]
    codec.configure(alignment_weight=0.0)
    alone = gradients(codec.loss(images)[0], layer)[0]
    assert float((with_alignment - alone).norm() / alone.norm()) == pytest.approx(0.3, rel=1e-3)


def test_the_adaptive_weight_follows_the_reconstructions_scale():
    codec, images = small_codec({}, {}), pictures(4)
    before = codec.loss(images)[1]
    codec.attach(Distance("similarity", Likeness(), 999.0))  # with it the reconstruction is 1000 times itself
    after = codec.loss(images)[1]
    for name in ("align_weight", "generator_weight"):
        assert float(after[name] / before[name]) == pytest.approx(1000, rel=1e-3)


def test_an_alignment_within_its_margins_leaves_the_training_alone():
    codec, images = small_codec(dict(cosine_margin=2.0, distance_margin=2.0)), pictures(4)
    loss, logs = codec.loss(images)
    assert logs["align_cosine"] == logs["align_distance"] == 0
    torch.testing.assert_close(loss, small_codec().loss(images)[0])
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in codec.parameters())


def test_an_alignment_that_is_almost_met_is_not_blown_up():
    codec, images = small_codec({}, kl_weight=0.0), pictures(4)
    with torch.no_grad():  # latents that hardly follow the encoder: neither do the terms
        codec.vae.quant_conv.weight.mul_(1e-6)
        codec.vae.quant_conv.bias[:4] = 1.0
    layer = codec.vae.encoder.conv_out.weight
    with_alignment = gradients(codec.loss(images)[0], layer)[0]
    codec.configure(alignment_weight=0.0)
    alone = gradients(codec.loss(images)[0], layer)[0]
    assert (with_alignment - alone).norm() < 0.1 * alone.norm()


def test_half_precision_does_not_lose_the_weight():
    codec, images = small_codec({}, patch_size=(4, 4)), 1e-3 * pictures(128)
    with torch.no_grad():  # a mean over so many small errors has gradients below float16's smallest
        for parameter in codec.vae.decoder.conv_out.parameters():
            parameter.mul_(0.01)
    exact = codec.loss(images)[1]["align_weight"]
    with torch.autocast("cpu", dtype=torch.float16):
        assert float(codec.loss(images)[1]["align_weight"]) == pytest.approx(float(exact), rel=0.1)
        codec.attach(Distance("similarity", Likeness(), 1e15))  # and one beyond its largest
        loss, logs = codec.loss(images)
        assert logs["align_weight"] == 0 and loss.isfinite()


def test_checkpointed_activations_change_neither_weights_nor_gradients():
    found = []
    for checkpointing in (False, True):
        codec = small_codec({}, {}, gradient_checkpointing=checkpointing)
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
    images, aligned = pictures(64), small_codec(dict(alignment_weight=0.25), **sizes)
    with torch.no_grad():
        before = aligned.loss(images)[1]
    plain, after = trained(small_codec(**sizes), images, 80), trained(aligned, images, 80)
    assert after["align_cosine"] < before["align_cosine"] / 2
    assert after["align_distance"] < before["align_distance"] / 2
    assert after["psnr_db"] > plain["psnr_db"] - 1


def test_a_held_out_loss_is_the_kl_codecs():
    codec, images = small_codec({}, {}), pictures(4)
    with torch.no_grad():
        loss, logs = codec.loss(images)
        torch.testing.assert_close(loss, small_codec().loss(images)[0])
    assert {"align_cosine", "align_distance"} <= logs.keys()
    assert codec.losses["adversary"].batches == 0


# The adversary -----------------------------------------------------------------------------------------------------


def test_each_opponent_learns_from_its_own_loss_only():
    codec, images = small_codec(None, {}, kl_weight=0.0), pictures(4)
    loss, logs = codec.loss(images)
    loss.backward()
    discriminator = codec.losses["adversary"].discriminator
    output = codec.vae(images).sample  # `decode` would clip it
    real, fake = discriminator(images), discriminator(output.detach())
    hinge = ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2
    torch.testing.assert_close(logs["discriminator"], hinge.detach())
    own = list(discriminator.parameters())
    torch.testing.assert_close([p.grad for p in own], gradients(hinge, *own), atol=1e-6, rtol=1e-4)
    rest = list(codec.vae.parameters())
    generator = -discriminator(output).mean()
    last = codec.vae.decoder.conv_out.weight
    mse = F.mse_loss(output, images)
    weight = 0.5 * gradients(mse, last)[0].norm() / gradients(generator, last)[0].norm()
    torch.testing.assert_close(logs["generator_weight"], weight)
    wanted = gradients(mse + weight * generator, *rest)
    torch.testing.assert_close([p.grad for p in rest], list(wanted), atol=1e-6, rtol=1e-3)


def test_the_discriminator_waits_for_its_batch():
    codec, images = small_codec(None, dict(adversarial_start=2)).train(), pictures(4)
    acted = ["discriminator" in codec.loss(images)[1] for _ in range(4)]
    assert acted == [False, False, True, True]
    codec.eval()
    codec.loss(images)
    assert codec.losses["adversary"].batches == 4


def test_the_discriminator_learns_to_distinguish_noise_from_pictures():
    torch.manual_seed(0)
    network = PatchGAN(1, width=8, layers=2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.5, 0.9))
    real, fake = pictures(32), pictures(32) + 0.3 * torch.randn(32, 1, 16, 16)
    for _ in range(60):
        loss = (1 - network(real)).relu().mean() + (1 + network(fake)).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert network(real).mean() > 0.5 and network(fake).mean() < -0.5
    torch.testing.assert_close(network(real[:1]), network(real)[:1])  # no window's logits depend on its batch


def test_a_discriminator_deeper_than_the_image_is_refused():
    with pytest.raises(ValueError, match="^discriminator_layers 3 is too many for 16 pixels$"):
        Adversary(1, 16)


# Training and saving -----------------------------------------------------------------------------------------------


def test_a_resumed_run_with_losses_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path):
    config = TrainConfig(steps=6, batch_size=4, warmup_steps=1, ema_decay=0.9, evaluate_every=2, save_every=2)
    data = Batches((pictures(12), torch.arange(12) % 2))
    build = lambda: small_codec({}, dict(adversarial_start=1), num_users=2)

    def run(folder, preview=None):
        codec = build()
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
    assert whole.losses["adversary"].batches == 6
    first, last = build().losses, whole.losses
    assert not torch.equal(last["adversary"].discriminator[0].weight, first["adversary"].discriminator[0].weight)
    assert not torch.equal(last["alignment"].projection.weight, first["alignment"].projection.weight)


def test_the_discriminator_has_its_own_moments_and_no_parameter_is_left_out():
    codec = small_codec({}, {}, num_users=2)
    groups, own = codec.parameter_groups(), list(codec.losses["adversary"].parameters())
    assert groups[1]["betas"] == (0.5, 0.9) and len(groups[1]["params"]) == len(own)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in codec.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(codec.parameters()))
    assert len(small_codec({}).parameter_groups()) == 1


def test_a_saved_codec_holds_no_loss_and_keeps_them_attached(tmp_path):
    codec, images = small_codec({}, {}, num_users=2), pictures(4)
    attached = {name: tensor for name, tensor in codec.state_dict().items() if name.startswith("losses.")}
    assert {name.split(".")[1] for name in attached} == {"alignment", "adversary"}
    assert not any("filters" in name for name in attached), "the foundation is neither trained nor checkpointed"
    codec.calibrate(images)
    codec.save_pretrained(tmp_path)
    assert codec.state_dict().keys() > small_codec(num_users=2).state_dict().keys()
    again = VAVAE.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == codec.state_dict().keys() - attached.keys()
    assert torch.equal(again.encode(images), codec.encode(images))
    (tmp_path / "file").touch()
    with pytest.raises(Exception, match="file"):
        codec.save_pretrained(tmp_path / "file" / "below")
    assert codec.state_dict().keys() > again.state_dict().keys(), "a failed save leaves the losses attached"
    codec.detach_losses()
    assert codec.state_dict().keys() == again.state_dict().keys()


def test_losses_that_earlier_versions_saved_in_the_codec_are_ignored(tmp_path):
    codec, images = small_codec(), pictures(2)
    codec.save_pretrained(tmp_path)
    weights = codec.state_dict() | {"projection.weight": torch.ones(8, 4, 1, 1), "batches": torch.tensor(3)}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, next(tmp_path.glob("*.safetensors")))
    assert torch.equal(VAVAE.from_pretrained(tmp_path).encode(images), codec.encode(images))


def test_stages_change_options_of_attached_losses():
    codec, images = small_codec({}, dict(adversarial_start=9)), pictures(4)
    codec.configure(alignment_weight=0.1, cosine_margin=0.5, adversarial_start=1)
    alignment, adversary = codec.losses["alignment"], codec.losses["adversary"]
    assert (alignment.alignment_weight, alignment.cosine_margin, adversary.adversarial_start) == (0.1, 0.5, 1)
    logs = codec.loss(images)[1]
    codec.configure(cosine_margin=0.0)
    assert logs["align_cosine"] < codec.loss(images)[1]["align_cosine"]
    small_codec().configure(alignment_weight=0.1)  # no alignment is attached: no effect
