"""What the documents say of one's own photographs, run as written on small ones: shorter, smaller, and on the CPU."""
import csv
import re

import pytest
import torch

import main as program
from helpers import ROOT
from helpers.documents import DOCUMENTS, command_lines, section
from helpers.photos import write_photos
from scripts import predict

README, TRAINING = DOCUMENTS["README.md"], DOCUMENTS["TRAINING.md"]
SMALL = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--epochs", "1", "--num_workers", "0",
         "--device", "cpu"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where a user stands: in the repository, with photographs in class folders."""
    write_photos(tmp_path, train=24, val=6)
    (tmp_path / "photos").symlink_to(tmp_path / "train")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(text, heading, *named):
    """The words behind main.py, or a script, of the one command line in a section that has all these words."""
    (words,) = (words for words in command_lines(section(text, heading)).values() if set(named) <= set(words))
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1:]


def test_readme_from_photographs_to_predictions(home, capsys):
    section_of = (README, "Train, evaluate, predict")
    assert program.main([*words_of(*section_of, "configs/train/scratch_small.yaml"), *SMALL]) == 0
    assert "held out for validation: 3 of the 24 images" in capsys.readouterr().out
    assert program.main([*words_of(*section_of, "--eval"), "--device", "cpu", "--num_workers", "0"]) == 0
    assert re.search(r"\* Acc@1 \d+\.\d{3} .* of the network on 3 val images", capsys.readouterr().out)
    assert predict.main([*words_of(*section_of, "--checkpoint"), "--device", "cpu", "--num_workers", "0"]) == 0
    rows = list(csv.DictReader((home / "predictions.csv").open(encoding="utf-8")))
    assert len(rows) == 24 and {row["class_1"] for row in rows} <= {"class0", "class1", "class2"}


@pytest.mark.parametrize("heading,named,frozen", [
    ("Your own photographs", ["--finetune"], False), ("Fine-tuning", ["--freeze_backbone"], True),
])
def test_training_from_weights(home, capsys, heading, named, frozen):
    assert program.main([*words_of(TRAINING, "Your own photographs", "configs/train/scratch_small.yaml"), *SMALL,
                         "--data_path", str(home), "--output_dir", "first"]) == 0
    (home / "train" / "class2").rename(home / "train" / "other")
    (home / "val" / "class2").rename(home / "val" / "other")
    given = {"/path/to/photos": str(home), "/path/to/weights.pth": "first/best.pth"}
    words = [given.get(word, word) for word in words_of(TRAINING, heading, *named)]
    assert program.main([*words, *SMALL, "--output_dir", "second"]) == 0
    assert "the classifier is re-initialised" in capsys.readouterr().out
    before, after = (torch.load(f"{name}/last.pth", weights_only=True)["model"] for name in ("first", "second"))
    name = "stem.conv1.weight"
    assert torch.equal(before[name], after[name]) == frozen
