"""Classifiers are the same for the same windows, and saved for other runs."""

from dataclasses import replace

import pytest
import torch
from toys import USERS, evidence, windows

from mdlib.evaluation import classifiers
from mdlib.evaluation.augmentation_study import real_only_classifiers
from mdlib.evaluation.classifiers import trained_once
from mdlib.evaluation.evidence import Protocol
from mdlib.models.classifier import ResNet18, SmallCNN, features


def test_a_resnet_learns_users_and_is_saved(tmp_path, monkeypatch):
    real, others = windows(8, 1), windows(8, 2, 40)
    how = (ResNet18, tmp_path, real.images, real.labels, real.num_users, 40)
    found = trained_once(*how)
    assert (found.probabilities(others.images).argmax(1) == others.labels).float().mean() > 0.5, "chance is a quarter"
    monkeypatch.setattr(classifiers, "train_classifier", None)
    again = trained_once(*how)
    torch.testing.assert_close(found.probabilities(others.images), again.probabilities(others.images))


def test_classifiers_of_real_windows_are_saved_for_other_runs(tmp_path, monkeypatch):
    protocol, case = Protocol(evaluation_steps=2, seeds=2), evidence(windows(5, 7))
    trained = real_only_classifiers(case, protocol, tmp_path)
    monkeypatch.setattr(classifiers, "train_classifier", None)
    again = real_only_classifiers(case, protocol, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for one, other in zip(trained, again, strict=True):
        torch.testing.assert_close(one.probabilities(case.test.images), other.probabilities(case.test.images))
    for changed in (replace(case, train=windows(3, 9)), case):
        with pytest.raises(TypeError):
            real_only_classifiers(
                changed, protocol if changed is not case else replace(protocol, evaluation_steps=3), tmp_path
            )


def test_classifiers_of_another_version_are_not_used(tmp_path, monkeypatch):
    protocol, case = Protocol(evaluation_steps=2, seeds=2), evidence(windows(5, 7))
    real_only_classifiers(case, protocol, tmp_path)
    monkeypatch.setattr(classifiers, "source_code", lambda kind: "changed")
    real_only_classifiers(case, protocol, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_classifiers_that_train_side_by_side_are_the_same(monkeypatch, tmp_path):
    protocol, case = Protocol(evaluation_steps=3, seeds=2), evidence(windows(5, 7))
    monkeypatch.setattr("mdlib.evaluation.classifiers.training_at_once", lambda: 2)
    beside = real_only_classifiers(case, protocol, tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr("mdlib.evaluation.classifiers.training_at_once", lambda: 1)
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
