"""The ruler itself: what is fed in decides what it says."""

import html
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import write_set

from mdlib import metrics, validate
from mdlib.data import DataError, WindowFile, WindowSet
from mdlib.judge import Judge
from mdlib.report import load_generated, write_report
from mdlib.vae import KLVAE
from mdlib.validate import (
    Arms,
    Evidence,
    Protocol,
    _mixed,
    alike,
    codec_choice,
    concatenate,
    evaluate,
    features,
    fidelity,
    first,
    halves,
    memorisation,
    other_label,
    real_only_judges,
    through_codec,
    time_blocks,
    verdict,
)
from mdlib.vavae import VAVAE
from mdlib.vqvae import VQVAE

USERS = (2, 5, 9, 11)


def gait(label: int, n: int, seed: int, spread: float = 0.8) -> torch.Tensor:
    """Toy windows uint8 (n, 1, 32, 32): a bright ridge that swings four times; height and swing tell the user."""
    rng = np.random.default_rng([seed, label])
    time = np.arange(32) / 8
    height = 10 + 3.0 * label + spread * rng.normal(size=(n, 1))
    ridge = height + (1 + label % 2 + 0.3 * rng.normal(size=(n, 1))) * np.sin(2 * np.pi * time)
    image = np.exp(-((np.arange(32)[None, :, None] - ridge[:, None, :]) ** 2) / 4) + 0.08 * rng.random((n, 32, 32))
    return torch.from_numpy((255 * image.clip(0, 1)).astype(np.uint8)).unsqueeze(1)


def windows(n: int, seed: int, start: int = 0, of=gait) -> WindowSet:
    images = torch.cat([of(label, n, seed) for label in range(len(USERS))])
    files = tuple(
        WindowFile(f"ID_{user}/w{start + i}.png", user, "", "w", start + i) for user in USERS for i in range(n)
    )
    labels = torch.arange(len(USERS)).repeat_interleave(n)
    return WindowSet(images=images, labels=labels, users=USERS, files=files, colormap="jet", root="toy")


def evidence(generated: WindowSet, **changes) -> Evidence:
    parts = dict(train=windows(3, 1), val=windows(12, 2, 40), test=windows(25, 3, 80), generated=generated, gap=4)
    return Evidence(**{**parts, **changes})


QUICK = Protocol(judge_steps=60, seeds=2, variants=2)


@pytest.fixture(scope="module")
def honest():
    """Held-out real windows fed in as generated."""
    return evaluate(evidence(windows(20, 7)), QUICK)


def test_every_key_of_the_protocol_is_there(honest):
    keys = {"reconstruction", "codebook", "identity", "augmentation", "fidelity", "memorisation", "physics", "verdict"}
    assert keys <= honest.keys()
    for section in keys - {"verdict"}:
        for name, value in honest[section].items():
            if isinstance(value, dict):
                assert value["value"] is not None and value["n"] > 0 or value["reason"], (section, name)
    assert honest["fidelity"]["kid"] == {"value": None, "reason": "not yet measured by this version"}
    assert honest["reconstruction"]["psnr_db"]["reason"] == "no codec was given"
    assert all(figure["value"] is not None for figure in honest["physics"].values())
    json.dumps(honest, allow_nan=False)


def test_real_windows_fed_in_as_generated_pass(honest):
    assert honest["identity"]["judge_accuracy"]["value"] > 0.6
    assert honest["identity"]["accuracy"]["value"] > 0.8 * honest["identity"]["judge_accuracy"]["value"]
    assert honest["augmentation"]["gain"]["value"] > -0.02
    assert 0.5 < honest["memorisation"]["nearest_train_ratio"]["value"] < 1.5
    assert honest["memorisation"]["copies"]["value"] < 0.2
    assert 0.5 < honest["fidelity"]["fd_ratio"]["value"] < 2
    assert {honest["fidelity"][name]["n"] for name in ("fd", "fd_real_vs_real", "fd_train")} == {12}


def test_noise_fails_everything():
    noise = windows(20, 0, of=lambda label, n, seed: torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8))
    report = evaluate(evidence(noise), QUICK)
    assert report["identity"]["accuracy"]["value"] < 0.5
    assert report["augmentation"]["generated_only"]["value"] < 0.6
    assert report["verdict"]["word"] in ("hurts", "no evidence")
    assert report["fidelity"]["fd_ratio"]["value"] > 5
    assert report["fidelity"]["fd"]["value"] > 5 * report["fidelity"]["fd_train"]["value"]


def test_windows_of_another_user_fail_identity(honest):
    swapped = windows(20, 7, of=lambda label, n, seed: gait((label + 1) % 4, n, seed))
    report = evaluate(evidence(swapped), QUICK)
    assert report["identity"]["accuracy"]["value"] < 0.3
    assert report["identity"]["control_ratio"]["value"] < 1 < honest["identity"]["control_ratio"]["value"]


def test_copies_of_training_windows_are_told():
    train = windows(3, 1)
    copied = train.select(torch.arange(len(train)).repeat_interleave(4))
    found = memorisation(evidence(copied))
    assert found["nearest_train_ratio"]["value"] < 0.01 and found["copies"]["value"] == 1.0


def test_the_share_of_generated_windows_is_what_it_says():
    real, made = (torch.zeros(10, 1), torch.zeros(10)), (torch.ones(70, 1), torch.ones(70))
    for share in (0.125, 0.25, 0.5):
        images, labels = _mixed(real, made, share)
        assert float(images.mean()) == pytest.approx(share, abs=0.01) and torch.equal(images.flatten(), labels)
        assert int(images.sum()) >= 70, "every generated window takes part"


def test_overlapping_windows_are_one_block():
    blocks = time_blocks(windows(10, 0), gap=4)
    assert [len(set(blocks[10 * k : 10 * k + 10])) for k in range(4)] == [3, 3, 3, 3]
    assert len(set(blocks)) == 12


def test_halves_of_real_windows_share_no_step():
    unseen = concatenate(windows(12, 2, 40), windows(25, 3, 80))
    first, second = halves(unseen, gap=4)
    assert not set(first) & set(second)
    for label in range(len(USERS)):
        one, other = (
            np.array([unseen.files[row].number for row in rows if unseen.labels[row] == label])
            for rows in (first, second)
        )
        assert len(one) >= 5 and len(other) >= 5
        assert abs(one[:, None] - other).min() >= 4


def test_sets_are_compared_at_equal_numbers_of_each_user():
    sets = {"few": windows(3, 1).select(range(1, 12)), "many": windows(9, 2)}
    rows = alike(sets, seed=0)
    drawn = {name: part.labels[rows[name]].bincount().tolist() for name, part in sets.items()}
    assert drawn == {"few": [2, 3, 3, 3], "many": [2, 3, 3, 3]}
    assert len(set(rows["many"].tolist())) == 11
    assert rows["many"].tolist() == alike(sets, seed=0)["many"].tolist() != alike(sets, seed=1)["many"].tolist()


def test_the_first_windows_of_each_user_are_taken():
    few = first(windows(5, 7).select(torch.randperm(20)), 2)
    assert few.labels.bincount().tolist() == [2, 2, 2, 2]


def test_the_gain_is_told_for_fewer_generated_windows():
    protocol = Protocol(judge_steps=2, seeds=2, variants=1, counts=(2, 4, 9))
    found = evaluate(evidence(windows(5, 7)), protocol)["augmentation"]
    assert [row["windows_per_user"] for row in found["gain_by_windows"]] == [2, 4, 5], "nine were not made"
    assert found["gain_by_windows"][-1]["value"] == found["gain"]["value"]


def test_judges_of_real_windows_are_kept_for_other_runs(tmp_path, monkeypatch):
    protocol, case = Protocol(judge_steps=2, seeds=2, variants=1), evidence(windows(5, 7))
    trained = real_only_judges(case, protocol, tmp_path)
    monkeypatch.setattr(validate, "train_judge", None)
    again = real_only_judges(case, protocol, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for one, other in zip(trained, again, strict=True):
        torch.testing.assert_close(one.probabilities(case.test.images), other.probabilities(case.test.images))
    for changed in (replace(case, train=windows(3, 9)), case):
        with pytest.raises(TypeError):
            real_only_judges(changed, protocol if changed is not case else replace(protocol, judge_steps=3), tmp_path)


def test_fidelity_needs_windows_in_every_set():
    judges = Arms({"real_only": [Judge(len(USERS))]}, {}, 0.5)
    found = fidelity(evidence(windows(5, 7), val=windows(2, 2, 40), test=windows(2, 3, 42)), judges)
    assert found["fd"]["value"] is None and "both halves" in found["fd_ratio"]["reason"]


def test_features_come_in_batches():
    judge, images = Judge(len(USERS)), windows(4, 0).images
    assert features(judge, images).shape[0] == 16
    torch.testing.assert_close(features(judge, images), features(judge, images, batch_size=5))


CODEC = dict(image_size=32, patch_size=(2, 2), block_out_channels=(8,), norm_num_groups=4)


def test_two_codecs_of_different_kinds_are_compared():
    torch.manual_seed(0)
    vq, kl = VQVAE(**CODEC, num_codes=8, code_dim=4).eval(), KLVAE(**CODEC).eval()
    made = windows(5, 7)
    choice = codec_choice(evidence(made, codec=vq, rival=kl), psnr_db=40.0)["codec_choice"]
    assert choice["vq_psnr_db"] == 40 and choice["kl_psnr_db"] == choice["rival_psnr_db"]["value"] < 30
    assert choice["choice"] == ("vq" if choice["usage"] > 0.8 else "kl")
    assert choice["n"] == 100 and choice["usage_n"] == 4 * 37
    swapped = codec_choice(evidence(made, codec=kl, rival=vq), psnr_db=40.0)["codec_choice"]
    assert swapped["kl_psnr_db"] == 40 and swapped["choice"] == "kl" and swapped["usage"] == choice["usage"]
    assert codec_choice(evidence(made, codec=vq), 40.0)["codec_choice"]["reason"] == "no rival codec was given"
    alone = codec_choice(evidence(made, codec=kl, rival=kl), 40.0)["codec_choice"]
    assert alone["reason"] == "both codecs are of one kind"


def test_two_codecs_of_one_kind_are_compared_by_their_psnr():
    torch.manual_seed(0)
    own, rival, made = VAVAE(**CODEC).eval(), KLVAE(**CODEC).eval(), windows(5, 7)
    found = codec_choice(evidence(made, codec=own, rival=rival), psnr_db=40.0)["rival_psnr_db"]
    test = evidence(made).test
    expected = metrics.psnr(through_codec(rival, test.images), test.float()).mean()
    assert found["value"] == pytest.approx(float(expected)) and found["n"] == len(test)


class Stamp(VAVAE):
    """Told a user, it draws that user's brightness over whatever it is shown."""

    def encode(self, images, labels=None):
        return images[:, :, :1, :1]

    def decode(self, latents, labels=None):
        return (labels.float() / 2 - 0.75).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)


class Brightness(Judge):
    """Names the user whose brightness a window has."""

    def forward(self, images):
        return -(images.mean((1, 2, 3)).unsqueeze(1) - (torch.arange(len(USERS)) / 2 - 0.75)).abs()


def test_a_codec_that_draws_the_user_it_is_told_is_found_out():
    torch.manual_seed(0)
    codec, made = Stamp(**CODEC, num_users=len(USERS)), windows(5, 7)
    arms = Arms({"real_only": [Brightness(len(USERS))]}, {}, 0.5)
    found = other_label(evidence(made, codec=codec), arms)
    assert found["taken_for_other_label"]["value"] == 1 and found["psnr_db_other_label"]["value"] < 30
    with pytest.raises(DataError, match="the codec was told 3 users, these windows are of 4"):
        evidence(made, codec=Stamp(**CODEC, num_users=3))
    plain = other_label(evidence(made, codec=VAVAE(**CODEC)), arms)
    assert {figure["reason"] for figure in plain.values()} == {"this codec is told no users"}


@pytest.mark.parametrize("changes", [dict(image_size=64), dict(patch_size=(1, 1)), dict(in_channels=3)])
def test_codecs_of_different_sizes_are_not_compared(changes):
    vq = VQVAE(**CODEC, num_codes=8, code_dim=4)
    with pytest.raises(DataError, match="one size and one latent grid") as error:
        evidence(windows(5, 7), codec=vq, rival=KLVAE(**{**CODEC, **changes}))
    assert "\n" not in str(error.value)


def test_the_command_line_takes_a_rival(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from mdlib.__main__ import app

    codec = VQVAE(**CODEC, num_codes=8, code_dim=4).eval()
    monkeypatch.setattr("mdlib.pipeline.load_pipeline", lambda path: SimpleNamespace(codec=codec))
    KLVAE(**CODEC).save_pretrained(tmp_path / "two")
    files = [path.as_posix() for path in write_set(tmp_path / "real", numbers=range(24)).glob("*/*.png")]
    write_set(tmp_path / "made", numbers=range(2))
    parts = {"train": range(4), "val": range(8, 12), "test": range(16, 24)}
    name = lambda path: path.split("/real/")[1]
    number = lambda path: int(path.split("Doppler")[1][:-4])
    split = {part: [name(path) for path in files if number(path) in some] for part, some in parts.items()}
    (tmp_path / "split.json").write_text(json.dumps({**split, "gap": 4}))
    options = dict(real="real", generated="made", split="split.json", out="out", pipeline="one", rival="two")
    words = [word for key, value in options.items() for word in (f"--{key}", str(tmp_path / value))]
    app(["validate", *words, "--judge-steps", "1", "--seeds", "2"], standalone_mode=False)
    choice = json.loads((tmp_path / "out" / "report.json").read_text())["reconstruction"]["codec_choice"]
    assert choice["sentence"] in html.unescape((tmp_path / "out" / "report.html").read_text())


@pytest.mark.parametrize(
    "ci95, word", [([0.01, 0.05], "helps"), ([-0.02, 0.03], "no evidence"), ([-0.05, -0.01], "hurts")]
)
def test_the_verdict_comes_from_the_interval(honest, ci95, word):
    told = verdict({**honest["augmentation"], "gain_ci95": ci95})
    assert told["word"] == word and "real windows a user" in told["sentence"]


def test_the_report_is_one_page_that_opens_offline(honest, tmp_path):
    codec = VQVAE(image_size=32, patch_size=(2, 2), block_out_channels=(8,), norm_num_groups=4, num_codes=8, code_dim=4)
    given = evidence(windows(20, 7), codec=codec.eval())
    report = evaluate(given, Protocol(judge_steps=2, seeds=2, variants=1), about={"data": "<toy> & more"})
    assert report["reconstruction"]["psnr_db"]["value"] < 30 and report["codebook"]["usage"]["n"] == 4 * 37
    write_report(report, given, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert page.index(report["verdict"]["sentence"].split(" (gain")[0]) < page.index("<table>")
    assert "&lt;toy&gt; &amp; more" in page and page.count("data:image/png;base64,") == 6
    assert "http" not in page.replace("http-equiv", "")


def test_judges_do_not_see_what_they_are_asked_about(monkeypatch):
    import mdlib.validate as module

    seen = []

    def fake(images, labels, num_users, *_):
        seen.append(images)
        return Judge(num_users).eval()

    monkeypatch.setattr(module, "train_judge", fake)
    given = evidence(windows(5, 7))
    evaluate(given, Protocol(judge_steps=1, seeds=2, variants=0))
    rows = lambda images: {image.numpy().tobytes() for image in images}
    train, test, made = rows(given.train.images), rows(given.test.images), rows(given.generated.images)
    unseen = rows(given.val.images) | test
    judges, choice, arms = seen[:2], seen[2:5], seen[5:]
    assert all(rows(images) == unseen for images in judges)
    assert all(rows(images) == train | made for images in choice)
    assert [rows(images) for images in arms] == [train, train | made, made] * 2
    assert all(not rows(images) & test for images in arms)


def test_generated_users_without_real_windows_are_refused(tmp_path):
    from PIL import Image

    (tmp_path / "ID_4").mkdir()
    Image.new("RGB", (32, 32), (0, 0, 143)).save(tmp_path / "ID_4" / "x_1.png")
    with pytest.raises(DataError, match="ID_4"):
        load_generated(tmp_path, windows(2, 0))
