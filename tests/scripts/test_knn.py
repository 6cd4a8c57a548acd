"""scripts/knn.py: classifiers of frozen features beside scikit-learn's, features beside timm's, and whole commands."""
import csv

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from datasets import Reading, ValSplit, build_dataset
from helpers import ROOT
from helpers.families import FAMILIES
from scripts import knn
from scripts.probing.classifiers import PENALTIES, LinearProbe, fit, knn_predictions
from scripts.probing.features import Extractor
from tasks.classification.images import ImagePipeline
from training.distributed import Distributed
from training.options import LoaderOptions
from training.precision import Precision

WORKERLESS = ["--num_workers", "0", "--device", "cpu", "--batch_size", "4"]


def clusters(count, seed):
    """Overlapping clusters of three classes in eight dimensions."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (count,), generator=generator)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    return centres[targets] + 1.5 * torch.randn(count, 8, generator=generator), targets


@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbours_vote_as_scikit_learns(k, monkeypatch):
    """With weights of the cosine distance d = 1 - s, exp((1 - d) / 0.07); in several chunks."""
    monkeypatch.setattr("scripts.probing.classifiers.CHUNK", 64)
    (train, targets), (test, _) = clusters(300, 1), clusters(200, 2)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(train.double().numpy(), targets.numpy())
    ours = knn_predictions(train.double(), targets, test.double(), [3, k])[k]
    assert (ours.numpy() == theirs.predict(test.double().numpy())).all()


def test_more_neighbours_than_images():
    train, targets = clusters(10, 1)
    found = knn_predictions(train, targets, train[:4], [10, 1000])
    assert torch.equal(found[10], found[1000])


@pytest.mark.parametrize("penalty", [0.1, 10.0])
def test_the_linear_classifier_is_scikit_learns(penalty):
    """The same minimum: weights, and biases up to a constant that no probability depends on."""
    inputs, targets = clusters(400, 3)
    ours = fit(inputs.double(), targets, 3, penalty)
    theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(inputs.double().numpy(), targets.numpy())
    assert np.allclose(ours[:, :-1], theirs.coef_, atol=1e-4)
    biases = ours[:, -1] - ours[:, -1].mean()
    assert np.allclose(biases, theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)


def test_the_penalty_is_chosen_without_the_images_that_are_evaluated():
    """Of useless features many, and few images: a strong penalty is better than a weak one."""
    inputs, targets = clusters(120, 4)
    noise = torch.randn(120, 400, generator=torch.Generator().manual_seed(5))
    probe = LinearProbe(torch.cat([inputs, noise], dim=1), targets, 3)
    penalty = probe.choose_penalty(seed=0)
    assert penalty in PENALTIES and penalty >= 1.0 and probe.choose_penalty(seed=0) == penalty


def test_a_feature_that_never_changes():
    inputs, targets = clusters(60, 6)
    inputs[:, 0] = 3.0
    probe = LinearProbe(inputs, targets, 3)
    probe.fit(1.0)
    assert probe.weights.isfinite().all() and (probe.predict(inputs) == targets).double().mean() > 0.6


@pytest.mark.parametrize("name", [*FAMILIES, "resnet10t"])
def test_features_are_what_the_classifier_is_given(name, photos):
    """timm's network without classifier gives the same."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3).eval()
    images = ImagePipeline(name, 32)
    dataset = build_dataset("image_folder", photos, "val", images.transform())
    extractor = Extractor(name, {}, network, images, Distributed(torch.device("cpu")), Precision())
    found = extractor.extract(dataset, LoaderOptions(batch_size=3, num_workers=0))
    network.reset_classifier(0)
    mean, std = (torch.tensor(images.config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        for i, row in enumerate(found.values):
            image, expected = dataset[i]
            assert torch.allclose(row, network(((torch.as_tensor(image) / 255 - mean) / std)[None])[0], atol=1e-5)
            assert found.targets[i] == expected


def test_two_networks_side_by_side(photos, tmp_path, capsys):
    """A published one and a checkpoint file, on images whose colour is their class."""
    torch.manual_seed(0)
    torch.save(dict(model=timm.create_model("resnet10t", num_classes=3).state_dict(), args=dict(model="resnet10t")),
               tmp_path / "mine.pth")
    words = ["biformer_nano", str(tmp_path / "mine.pth"), "--data_path", str(photos), "--input_size", "32"]
    assert knn.main([*words, *WORKERLESS, "--k", "1", "3", "--output", str(tmp_path / "out.csv")]) == 0
    out = capsys.readouterr().out
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["network"] for row in table] == words[:2] and list(table[0]) == ["network", "1-NN", "3-NN", "linear"]
    assert float(table[0]["linear"]) == 100.0 and f"linear {float(table[1]['linear']):.2f}" in out
    assert "13 training images, 7 images of val" in out


def test_the_table_of_the_documents_follows_from_the_record():
    with open(ROOT / "benchmarks/comparison/knn_clothing.csv", newline="", encoding="utf-8") as file:
        for name, *values in list(csv.reader(file))[1:]:
            line = f"| {name} | {' | '.join(f'{float(value):.1f}' for value in values)} |"
            assert line in (ROOT / "TRAINING.md").read_text()


@pytest.mark.parametrize("unseen", [True, False])
def test_images_that_a_checkpoint_was_trained_on_are_named(photos, tmp_path, capsys, unseen):
    """As main.py does where it evaluates one: held out now, and by the checkpoint's run perhaps not."""
    held_out = build_dataset("image_folder", photos / "train", "val", reading=Reading(val_split=ValSplit(0.4, 0)))
    images = held_out.held_out.images
    model = timm.create_model("resnet10t", num_classes=3)
    torch.save(dict(model=model.state_dict(), args=dict(model="resnet10t"), held_out="by another rule",
                    held_out_images=images if unseen else images[1:]), tmp_path / "mine.pth")
    words = [str(tmp_path / "mine.pth"), "--data_path", str(photos / "train"), "--val_split", "0.4", *WORKERLESS]
    assert knn.main([*words, "--input_size", "32", "--k", "1"]) == 0
    told = f"mine.pth may have been trained on 1 of the {len(images)} images held out for validation"
    assert (told in capsys.readouterr().err) == (not unseen)


@pytest.mark.parametrize(("words", "error"), [
    (["biformer_nono", "--data_path", "PHOTOS"], "biformer_nano"),
    (["biformer_nano"], "needs a data folder"),
    (["biformer_nano", "--data_path", "missing"], "data folder missing does not exist"),
    (["biformer_nano", "--data_path", "PHOTOS", "--split", "test"], "has no folder test"),
    (["runs/bset.pth", "--data_path", "PHOTOS"], "runs/bset.pth does not exist"),
    (["biformer_nano", "--data_set", "digits", "--val_split", "0.2"], "--val_split is for folders of images; digits"),
    (["biformer_nano", "--data_path", "PHOTOS", "--output", "."], "cannot write .: it is a folder"),
])
def test_mistakes(photos, capsys, words, error):
    words = [str(photos) if word == "PHOTOS" else word for word in words]
    assert knn.main([*words, *WORKERLESS]) in (1, 2)
    assert error in capsys.readouterr().err
