"""Sets that are compared share no step and have equal numbers of each user's windows. Classifiers are the same for
the same windows, and saved for other runs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_capture import called_again
from toys import USERS, evidence, real_only_classifiers, windows

from mdlib.data.files import WindowFile
from mdlib.data.windows import WindowSet
from mdlib.evaluation import evidence as evidence_file
from mdlib.evaluation.evidence import (
    Protocol,
    balanced_rows,
    compared_sets,
    concatenate,
    first_of_each,
    halves,
    trained_once,
)
from mdlib.models.classifier import ResNet18, SmallCNN, features
from mdlib.training import capture


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


@pytest.mark.parametrize("recordings", [1, 6])
def test_halves_are_as_large_for_every_user_and_condition(recordings):
    files = []
    for user, condition, recording in itertools.product(USERS, ("bag", "normal"), range(recordings)):
        for n in range(60 // recordings):
            files.append(WindowFile(f"{user}{condition}{recording}/{n}", user, condition, str(recording), n))
    labels = torch.tensor([USERS.index(file.user) for file in files])
    real = WindowSet(torch.zeros(len(files), 1, 8, 8, dtype=torch.uint8), labels, USERS, tuple(files), "jet", "")
    for user, condition in itertools.product(USERS, ("bag", "normal")):
        mine = [
            sum((files[row].user, files[row].condition) == (user, condition) for row in half)
            for half in halves(real, 4)
        ]
        assert min(mine) >= 20 and max(mine) <= 1.6 * min(mine), mine


def test_generated_windows_are_compared_where_real_ones_show_their_user():
    case = evidence(windows(5, 7))
    files = tuple(replace(file, condition="bag") if file.number % 2 else file for file in case.generated.files)
    sets = compared_sets(replace(case, generated=replace(case.generated, files=files)))
    assert {file.condition for file in sets["generated"].files} == {file.condition for file in case.unseen.files}
    assert 0 < len(sets["generated"]) < len(files)


def test_sets_are_compared_at_equal_numbers_of_each_user():
    sets = {"few": windows(3, 1).select(range(1, 12)), "many": windows(9, 2)}
    rows = balanced_rows(sets, seed=0)
    drawn = {name: part.labels[rows[name]].bincount().tolist() for name, part in sets.items()}
    assert drawn == {"few": [2, 3, 3, 3], "many": [2, 3, 3, 3]}
    assert len(set(rows["many"].tolist())) == 11
    assert (
        rows["many"].tolist()
        == balanced_rows(sets, seed=0)["many"].tolist()
        != balanced_rows(sets, seed=1)["many"].tolist()
    )


def test_the_first_windows_of_each_user_are_taken():
    few = first_of_each(windows(5, 7).select(torch.randperm(20)), 2)
    assert few.labels.bincount().tolist() == [2, 2, 2, 2]


def test_few_windows_are_taken_from_all_conditions():
    every = windows(6, 7)
    files = tuple(replace(file, condition="backpack" if row % 6 < 4 else "bag") for row, file in enumerate(every.files))
    few = first_of_each(replace(every, files=files), 4)
    assert [file.condition for file in few.files] == ["backpack", "backpack", "bag", "bag"] * 4
    assert few.labels.bincount().tolist() == [4, 4, 4, 4]


def test_a_resnet_learns_users_and_is_saved(tmp_path, monkeypatch):
    real, others = windows(8, 1), windows(8, 2, 40)
    how = (ResNet18, tmp_path, real.images, real.labels, real.num_users, 40)
    found = trained_once(*how)
    assert (found.probabilities(others.images).argmax(1) == others.labels).float().mean() > 0.5, "chance is a quarter"
    monkeypatch.setattr(evidence_file, "train_classifier", None)
    again = trained_once(*how)
    torch.testing.assert_close(found.probabilities(others.images), again.probabilities(others.images))


def test_a_classifier_of_captured_steps_is_that_of_eager_ones(monkeypatch, capsys):
    case, eager = evidence(windows(5, 7)), Protocol(evaluation_steps=6, seeds=1)
    graph = replace(eager, evaluation_compile="graph")
    real_only_classifiers(case, graph)
    assert "compile='graph' is not possible here" in capsys.readouterr().out
    monkeypatch.setattr(capture, "record", called_again)
    one, other = (real_only_classifiers(case, protocol)[0].state_dict() for protocol in (eager, graph))
    assert all(torch.equal(value, other[key]) for key, value in one.items()) and not capsys.readouterr().out


def test_classifiers_of_real_windows_are_saved_for_other_runs(tmp_path, monkeypatch):
    protocol, case = Protocol(evaluation_steps=2, seeds=2), evidence(windows(5, 7))
    trained = real_only_classifiers(case, protocol, tmp_path)
    monkeypatch.setattr(evidence_file, "train_classifier", None)
    again = real_only_classifiers(case, protocol, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for one, other in zip(trained, again, strict=True):
        torch.testing.assert_close(one.probabilities(case.test.images), other.probabilities(case.test.images))
    for changed in (replace(case, train=windows(3, 9)), case):
        with pytest.raises(TypeError):
            real_only_classifiers(
                changed, protocol if changed is not case else replace(protocol, evaluation_steps=3), tmp_path
            )


def test_two_runs_on_one_split_may_train_the_same_classifier_at_once(tmp_path, monkeypatch):
    real, train = windows(3, 1), evidence_file.train_classifier
    how = (SmallCNN, tmp_path, real.images, real.labels, real.num_users, 2)

    def slower(*arguments, **options):
        if not list(tmp_path.iterdir()):
            monkeypatch.setattr(evidence_file, "train_classifier", train)
            trained_once(*how)  # the other run
        return train(*arguments, **options)

    monkeypatch.setattr(evidence_file, "train_classifier", slower)
    assert trained_once(*how).config.num_users == len(USERS)
    assert len(list(tmp_path.iterdir())) == 1


def test_classifiers_of_another_version_are_not_used(tmp_path, monkeypatch):
    protocol, case = Protocol(evaluation_steps=2, seeds=2), evidence(windows(5, 7))
    real_only_classifiers(case, protocol, tmp_path)
    monkeypatch.setattr(evidence_file, "source_code", lambda kind: "changed")
    real_only_classifiers(case, protocol, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_classifiers_that_train_side_by_side_are_the_same(monkeypatch, tmp_path):
    protocol, case = Protocol(evaluation_steps=3, seeds=2), evidence(windows(5, 7))
    monkeypatch.setattr("mdlib.evaluation.evidence.training_at_once", lambda: 2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # of the processes, whatever the number of cores
    beside = real_only_classifiers(case, protocol, tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr("mdlib.evaluation.evidence.training_at_once", lambda: 1)
    torch.set_num_threads(1)  # as each of them had
    alone = real_only_classifiers(case, protocol)
    torch.set_num_threads(threads)
    assert len(list(tmp_path.iterdir())) == 2
    for one, other in zip(beside, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_features_come_in_batches():
    classifier, images = SmallCNN(len(USERS)), windows(4, 0).images
    assert features(classifier, images).shape[0] == 16
    torch.testing.assert_close(features(classifier, images), features(classifier, images, batch_size=5))
