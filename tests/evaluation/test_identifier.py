"""The identifier is chosen without test windows, survives the disk, knows whom it does not know, and names windows."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import message, write_image
from PIL import Image
from toys import ONCE, QUICK, USERS, evidence, gait, real_only_classifiers, windows

from mdlib.cli import main
from mdlib.data.colormaps import colorize
from mdlib.data.reading import hashes
from mdlib.data.windows import load_windows
from mdlib.evaluation.augmentation_study import Arms
from mdlib.evaluation.identifier import Identifier, best_identifier, lower_limit, open_set_rates, tables
from mdlib.models.classifier import SmallCNN


@pytest.fixture(scope="module")
def case():
    return evidence(windows(20, 7), train=windows(12, 1))


@pytest.fixture(scope="module")
def chosen(case):
    """Trained classifiers stand against untrained ones; what was chosen, and the section of the report."""
    untrained = [SmallCNN(len(USERS)) for _ in range(2)]
    networks = {"real_only": untrained, "real_plus_generated": real_only_classifiers(case, QUICK)}
    return best_identifier(case, Arms(networks, {}, 0.5), QUICK)


@pytest.fixture(scope="module")
def folder(chosen, tmp_path_factory):
    chosen[0].save_pretrained(path := tmp_path_factory.mktemp("run") / "identifier")
    return path


def write(root, label, names, n=6, seed=90):
    for name, image in zip(names, gait(label, n, seed)[:, 0].numpy(), strict=True):
        write_image(root / name, image)


@pytest.fixture
def named(folder, tmp_path, monkeypatch, capsys):
    """The command on a folder: exit code, output, tables of windows and of recordings."""

    def run(data, *options, identifier=folder):
        out = tmp_path / "answers.csv"
        words = ["--identifier", identifier, "--data", data, "--out", out, *options]
        monkeypatch.setattr("sys.argv", ["mdlib", "identify", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        answer = capsys.readouterr()
        found = [pd.read_csv(path) for path in (out, tmp_path / "answers-recordings.csv") if path.exists()]
        return end.value.code, answer.out + answer.err, *found

    return run


def test_validation_windows_choose_and_test_windows_do_not(case, chosen, monkeypatch):
    identifier, section = chosen
    assert section["arm"] == "real_plus_generated"
    assert section["accuracy"]["value"] > 0.8 and section["validation_accuracy"]["value"] > 0.8
    assert section["recording_accuracy"] == {"value": 1.0, "n": 4}
    rates = ("false_acceptance", "false_rejection", "equal_error_rate")
    monkeypatch.setattr("mdlib.evaluation.identifier.open_set_rates", lambda *_: dict.fromkeys(rates, {"value": 0.5}))
    good, bad = real_only_classifiers(case, ONCE), [SmallCNN(len(USERS))]
    swapped = replace(case, test=replace(case.test, labels=(case.test.labels + 1) % 4))
    assert best_identifier(swapped, Arms({"b": bad, "a": good}, {}, 0.5), ONCE)[1]["arm"] == "a"
    assert best_identifier(case, Arms({"b": good, "a": good}, {}, 0.5), ONCE)[1]["arm"] == "b"


def test_an_identifier_from_disk_gives_the_same_answers(case, chosen, folder):
    loaded = Identifier.from_pretrained(folder)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    assert loaded.users == list(USERS) and loaded.threshold == chosen[0].threshold
    answers = loaded(case.test.images)
    assert torch.equal(answers, chosen[0](case.test.images)) and torch.allclose(answers.sum(1), torch.ones(100))
    mean = torch.stack([one.probabilities(case.test.images) for one in loaded.networks]).mean(0)
    assert torch.equal(answers, mean)


def test_windows_of_any_size_and_kind_are_read_as_those_on_disk(case, folder):
    identifier, images = Identifier.from_pretrained(folder), case.test.images[::25]
    expected = identifier(images)
    large = images.repeat_interleave(3, 2).repeat_interleave(2, 3)
    pictures = [Image.fromarray(colorize(image[0].numpy(), "jet")) for image in large]
    grey = [Image.fromarray(image[0].numpy()) for image in large]
    for same in (images.float() / 127.5 - 1, large, pictures, grey):
        assert torch.allclose(identifier(same), expected, atol=1e-5)
    identifier.threshold = 0.5
    assert identifier.predict(torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.4, 0.2, 0.2, 0.2]])) == ["ID_5", "unknown"]
    assert identifier([]).shape == (0, 4)
    assert "(N, 1, H, W), got (2, 3, 8, 8)" in message(identifier, torch.zeros(2, 3, 8, 8))
    deep = Image.fromarray(np.full((8, 8), 60_000, np.uint16))
    assert "images of mode I;16 have no fixed value range" in message(identifier, [deep])


def test_grey_of_16_bits_is_read_on_the_scale_of_the_training_windows(case, tmp_path, recwarn):
    """A folder of dark windows alone must stay dark."""
    for n, image in enumerate(case.train.images[:8], 1):
        for user in (1, 2):
            path = tmp_path / "people" / f"ID_{user}" / f"w_{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy().astype(np.uint16) * 200 + user).save(path)
    people = load_windows(tmp_path / "people", size=16)
    again = people.about.scale
    dark = tmp_path / "dark"
    dark.mkdir()
    Image.fromarray(case.train.images[0, 0].numpy().astype(np.uint16) * 50).save(dark / "w_1.png")
    alone, known = (load_windows(dark, size=16, plain=True, scale=scale) for scale in (None, again))
    assert known.images.max() < 0.3 * alone.images.max()
    arms = Arms({"real_only": [SmallCNN(len(USERS))]}, {}, 0.5)
    identifier, _ = best_identifier(replace(case, train=replace(case.train, about=people.about)), arms, QUICK)
    assert identifier.config.reading["scale"] == again


class Sure:
    """Trained on windows whose grey is the user's label: sure of nine in ten windows of those users, whose second pixel
    is 0, and of one in ten windows of strangers."""

    def __init__(self, kind, folder, images, labels, outputs, *rest):
        self.users = {int(image[0, 0, 0]): label for image, label in zip(images, labels.tolist(), strict=True)}
        assert sorted(self.users.values()) == list(range(outputs)), "labels without gaps"

    def probabilities(self, images):
        found = torch.full((len(images), len(self.users)), 0.0)
        for row, image in enumerate(images[:, 0]):
            label, odd = int(image[0, 0]), bool(image[0, 1] != image[0, 0])
            most = (0.55 if odd else 0.9) if label in self.users else (0.95 if odd else 0.6)
            found[row] = (1 - most) / (len(self.users) - 1)
            found[row, self.users.get(label, 0)] = most
        return found


def test_strangers_are_windows_of_people_that_a_classifier_was_not_given(monkeypatch):
    monkeypatch.setattr("mdlib.evaluation.identifier.train_each", lambda jobs, about: (Sure(*job) for job in jobs))

    def grey(label, n, seed):
        images = torch.full((n, 1, 4, 4), label, dtype=torch.uint8)
        images[::10, :, 0, 1] = 0 if label else 9
        return images

    found = open_set_rates(windows(3, 1, of=grey), windows(20, 2, of=grey), ONCE)
    value = {name: one["value"] for name, one in found.items()}
    assert value["equal_error_rate"] == pytest.approx(0.1)
    # 0.6 would reject one right window in ten, so 0.55 decides, which every stranger reaches.
    assert (value["false_acceptance"], value["false_rejection"]) == (1, 0) and found["false_acceptance"]["n"] == 80


def test_thresholds_reject_the_least_sure_of_right_windows_and_recordings(case, chosen):
    identifier, section = chosen
    for every, name in zip(tables(identifier, case.val), ("threshold", "recording_threshold"), strict=True):
        limit = section[name]["value"]
        named = every.filter(like="ID_").idxmax(axis=1) == every["true_user"]
        right = every["probability"][named]
        assert limit == lower_limit(right.to_numpy())
        assert (right < limit).mean() <= 0.05 and (name == "recording_threshold" or 0.05 < (right <= limit).mean())
        assert ((every["user"] == "unknown") == (every["probability"] < limit)).all()


@pytest.mark.parametrize("count", [2, 8, 19, 40])
def test_a_limit_rejects_one_in_twenty_further_answers(count):
    rng = np.random.default_rng(0)
    sure = 1 / (1 + np.exp(-rng.normal(1.5, 1, (4000, count + 1))))
    rejected = np.mean([row[-1] < lower_limit(row[:-1]) for row in sure])
    assert rejected == pytest.approx(0.05, abs=0.012)
    assert lower_limit(sure[0, :1]) == 0 and 0 < lower_limit(np.ones(3)) < 1


def test_no_threshold_without_three_users(case):
    two = [part.select(part.labels < 2) for part in (case.train, case.val)]
    found = open_set_rates(*(replace(part, users=USERS[:2]) for part in two), ONCE)
    assert found["false_acceptance"]["value"] is None and "three users" in found["false_acceptance"]["reason"]


def test_folders_that_hold_no_identifier_are_one_line(folder, tmp_path):
    load = Identifier.from_pretrained
    assert "holds no identifier: give the identifier/ folder of a run" in message(load, tmp_path)
    SmallCNN(3).save_pretrained(tmp_path / "cnn")
    assert "holds no identifier" in message(load, tmp_path / "cnn")
    damaged = tmp_path / "damaged"
    for spoil in (
        lambda: (damaged / "config.json").write_text("{"),
        lambda: (damaged / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | {"users": [1]})
        ),
        lambda: next(damaged.glob("*.safetensors")).write_bytes(b"x"),
        lambda: next(damaged.glob("*.safetensors")).unlink(),
    ):
        Identifier.from_pretrained(folder).save_pretrained(damaged)
        spoil()
        assert "write the identifier again" in message(load, damaged)


def test_windows_and_recordings_are_named(named, tmp_path):
    for label, user in ((0, 2), (3, 11), (6, 40)):
        for day in (1, 2):
            write(tmp_path / f"data/ID_{user}", label, [f"day{day}_w{n}.png" for n in range(6)], seed=day)
    code, answer, every, recordings = named(tmp_path / "data")
    assert code == 0 and answer.count("\n") == 1 and "36 windows in 6 recordings" in answer
    assert list(every) == ["path", "recording", "true_user", "user", "probability", "ID_2", "ID_5", "ID_9", "ID_11"]
    assert list(recordings)[:4] == ["recording", "windows", "true_user", "user"] and (recordings["windows"] == 6).all()
    columns = ["ID_2", "ID_5", "ID_9", "ID_11"]
    assert np.allclose(every["probability"], every[columns].max(axis=1)) and set(every["user"]) <= {*columns, "unknown"}
    means = every.groupby("recording")[columns].mean()
    assert np.allclose(means.loc[recordings["recording"]], recordings[columns], atol=1e-5)
    known = recordings[recordings["true_user"] != "ID_40"]
    assert f"accuracy {100 * (every.user == every.true_user)[:24].mean():.1f} % by window" in answer
    assert f"{100 * (known['user'] == known['true_user']).mean():.1f} % by recording" in answer
    _, _, every, _ = named(tmp_path / "data", "--threshold", 0)
    assert "unknown" not in set(every["user"])


def test_plain_folders_are_named_by_recording(named, tmp_path):
    write(tmp_path / "flat", 0, [*(f"monday_{n}.png" for n in range(3)), *(f"friday_{n}.png" for n in range(3))])
    code, answer, every, recordings = named(tmp_path / "flat", "--threshold", 0)
    assert code == 0 and len(every) == 6 and "accuracy" not in answer
    assert sorted(recordings["recording"]) == ["friday_", "monday_"] and every["true_user"].isna().all()
    for label, name in ((0, "morning"), (3, "evening")):
        write(tmp_path / "folders" / name, label, [f"{name[:2]}{n}_walk.png" for n in range(6)])
    _, _, _, recordings = named(tmp_path / "folders", "--threshold", 0)
    assert dict(zip(recordings["recording"], recordings["user"], strict=True)) == {
        "evening": "ID_11",
        "morning": "ID_2",
    }


def test_training_windows_do_not_count_as_accuracy(folder, named, tmp_path):
    write(tmp_path / "data/ID_2", 0, [f"w{n}.png" for n in range(6)])
    identifier = Identifier.from_pretrained(folder)
    contents = hashes(tmp_path / "data", [f"ID_2/w{n}.png" for n in range(6)])
    identifier.register_to_config(trained_on=list(contents.values())[:4])
    identifier.save_pretrained(tmp_path / "again")
    _, answer, every, _ = named(tmp_path / "data", identifier=tmp_path / "again")
    assert f"accuracy {50 * (every['user'][4:] == 'ID_2').sum():.1f} % by window" in answer
    assert "not counted: 4 windows outside the test part" in answer


@pytest.mark.parametrize(
    "prepare, options, problem",
    [
        (lambda root: root.mkdir(), [], "no images in it; give a folder of windows"),
        (lambda root: None, [], "no such folder"),
        (lambda root: write(root, 0, [f"w{n}.png" for n in range(6)]), ["--threshold", 2], "between 0 and 1, got 2"),
        (lambda root: write(root, 0, ["w1.png"], 1), ["--crop", "auto"], "this is the only one: give its box"),
    ],
)
def test_what_cannot_be_named_is_one_line(named, tmp_path, prepare, options, problem):
    prepare(tmp_path / "data")
    code, answer = named(tmp_path / "data", *options)
    assert code == 1 and answer.count("\n") == 1 and answer.startswith("mdlib: ") and problem in answer


def test_ignored_images_are_reported(named, tmp_path):
    write(tmp_path / "data/ID_2", 0, [f"w{n}.png" for n in range(6)])
    write(tmp_path / "data/figures", 0, [f"w{n}.png" for n in range(6)])
    with pytest.warns(UserWarning, match="ignored: figures/ .6 images"):
        code, _, every, _ = named(tmp_path / "data")
    assert code == 0 and len(every) == 6
