"""What README and TRAINING say of models, recipes, commands and faults is what the repository holds."""
import re
import shlex
from decimal import ROUND_HALF_UP, Decimal

import pytest
import timm
import yaml

import models  # noqa: F401
from helpers import ROOT
from helpers.costs import ALL as COSTS
from helpers.published import gmacs
from training import options

README, TRAINING, INSTALL = ((ROOT / f"{name}.md").read_text() for name in ("README", "TRAINING", "INSTALL"))
DOCUMENTS = {"README.md": README, "TRAINING.md": TRAINING, "INSTALL.md": INSTALL}
SMALLEST = "biformer_nano"


def table(text, first_column):
    """The rows of the table whose first column has this title, as dictionaries; the first word of a row is its key."""
    lines = iter(text.splitlines())
    titles = next(cells(line) for line in lines if line.startswith(f"| {first_column} |"))
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows[cells(line)[0].split()[0]] = dict(zip(titles, cells(line), strict=True))
    return rows


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def section(text, heading):
    """From a heading to the next one."""
    return re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S).group(1)


def linked_recipe(cell):
    """The path in `[text](path)`, and the recipe there."""
    path = re.search(r"\((.+)\)", cell).group(1)
    return path, yaml.safe_load((ROOT / path).read_text())


def rounded(value, digits):
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


MODELS = table(README, "model")
RECIPES = table(section(TRAINING, "ImageNet-1K"), "model")


def test_every_model_has_a_row():
    assert set(MODELS) == {*COSTS, SMALLEST}
    assert set(RECIPES) == set(COSTS)


@pytest.mark.parametrize("name", COSTS)
def test_costs_of_a_model(name):
    parameters, cost = COSTS[name]
    assert MODELS[name]["parameters"] == f"{parameters / 1e6:.1f} M"
    assert MODELS[name]["GMACs at 224"] == rounded(cost, 1)


def test_costs_of_the_smallest_model():
    model = timm.create_model(SMALLEST, attn_impl="gather")
    assert MODELS[SMALLEST]["parameters"] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
    assert MODELS[SMALLEST]["GMACs at 224"] == rounded(gmacs(model), 2)


@pytest.mark.parametrize("name", COSTS)
def test_published_accuracy_is_the_same_everywhere(name):
    path, _ = linked_recipe(RECIPES[name]["recipe"])
    in_recipe = re.search(r"([\d.]+) % published", (ROOT / path).read_text()).group(1)
    assert MODELS[name]["Acc@1, published"] == RECIPES[name]["Acc@1 (the paper's)"] == in_recipe


@pytest.mark.parametrize("rows", [MODELS, RECIPES], ids=["README", "TRAINING"])
def test_recipes_are_those_of_their_rows(rows):
    for name, row in rows.items():
        assert linked_recipe(row["recipe"])[1]["model"] == name


# How the documents say what a recipe does, and the recipe's key for it.
PHRASES = {
    "epochs": r"([\d.]+) epochs at",
    "input_size": r"epochs at ([\d.]+)",
    "lr": r"learning rate ([\d.e-]+) for 512 images",
    "weight_decay": r"weight decay ([\d.]+)",
    "min_lr": r"cosine schedule to ([\d.e-]+)",
    "warmup_epochs": r"([\d.]+) epochs of warm-up",
    "warmup_lr": r"warm-up from ([\d.e-]+)",
    "mixup": r"mixup ([\d.]+)",
    "cutmix": r"cutmix ([\d.]+)",
    "reprob": r"random erasing ([\d.]+)",
    "smoothing": r"label smoothing ([\d.]+)",
    "model_ema_decay": r"EMA of the weights with decay ([\d.]+)",
    "clip_grad": r"gradient clipping ([\d.]+)",
}


def settings(text):
    """What a description of a recipe says, by the recipe's keys."""
    found = {key: re.findall(pattern, text) for key, pattern in PHRASES.items()}
    assert all(len(values) <= 1 for values in found.values()), found
    return {key: float(values[0]) for key, values in found.items() if values}


def described_recipes():
    """What TRAINING says of each model's recipe."""
    text = section(TRAINING, "ImageNet-1K")
    common = settings(text[: text.index("| model |")])
    described, difference = {}, ""
    for name, row in RECIPES.items():
        cell = row["differs from BiFormer's recipe in"]
        difference = difference if cell == "the same" else cell
        changes = settings(difference)
        assert len(changes) == (difference.count(",") + 1 if difference else 0), f"not understood: {difference}"
        described[name] = dict(common, **changes, drop_path=float(row["stochastic depth"]))
    return described


@pytest.mark.parametrize("name,described", described_recipes().items())
def test_recipe_is_as_described(name, described):
    recipe = linked_recipe(RECIPES[name]["recipe"])[1]
    assert {key: recipe.get(key) for key in described} == described
    assert set(PHRASES) - {"clip_grad"} <= set(described)
    # Beyond what is described, every recipe is BiFormer's.
    base = yaml.safe_load((ROOT / "configs" / "train" / "biformer_tiny.yaml").read_text())
    differing = {key for key in {*recipe, *base} if recipe.get(key) != base.get(key)}
    assert differing <= {"model", *described}


def commands(text):
    """What stands behind main.py in the command blocks of a document."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines() if re.search(r"(?<!\w)main\.py", line)]
    found = [line[line.index("main.py") + 1 :] for line in lines]
    return [words for words in found if words != ["..."]]


@pytest.mark.parametrize(
    "words", [w for text in (README, TRAINING) for w in commands(text)], ids=lambda words: " ".join(words[:4])
)
def test_commands_are_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    options.parse([word.replace("/MODEL.yaml", "/biformer_tiny.yaml") for word in words])


def test_evaluation_output_has_no_figures():
    """They would be read as measured here."""
    assert "* Acc@1 ACC1 Acc@5 ACC5 loss LOSS" in section(TRAINING, "Evaluation")


def test_faults_are_those_of_the_record():
    text, record = section(README, "Reliability"), (ROOT / "benchmarks" / "faults.md").read_text()
    rows, recorded = ([line for line in t.splitlines() if line.startswith("|")] for t in (text, record))
    assert sorted(rows) == sorted(recorded) and rows[-1] == recorded[-1]
    assert record.splitlines()[-1] in text


def anchors(text):
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name,text", DOCUMENTS.items(), ids=list(DOCUMENTS))
def test_links_lead_somewhere(name, text):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert not path or (ROOT / path).exists(), link
        if anchor:
            assert anchor in anchors(DOCUMENTS[path or name]), link
