"""Numbers, recipes, commands, links and paths in the documents are those of the repository."""
import re
import sys
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
import timm
import torch
import yaml

import hydra_main
import main
import models  # noqa: F401
from datasets import build_dataset
from helpers import ROOT
from helpers.costs import ALL as COSTS
from helpers.documents import DOCUMENTS, blocks, command_lines, section
from helpers.photos import write_photos
from helpers.published import gmacs

README, TRAINING = DOCUMENTS["README.md"], DOCUMENTS["TRAINING.md"]
SHIPPED = ("biformer_nano", "debiformer_nano")


def parse(words):
    """Read the words of a command line of main.py; raises where it is not understood."""
    return main.parse(words)


def parse_overrides(words, monkeypatch):
    """Read the words of a command line of hydra_main.py, and the command lines of main.py that it stands for."""
    monkeypatch.setattr(sys, "argv", ["hydra_main.py", *words])
    for run in hydra_main.read_runs():
        parse(run.argv)


# --- Markdown -------------------------------------------------------------------------------------------------------


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(text, first_column):
    """The rows of the table whose first column has this title, as dictionaries by its rows' first words or links."""
    lines = iter(text.splitlines())
    titles = next(cells(line) for line in lines if line.startswith(f"| {first_column} |"))
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        rows[re.match(r"[`\[]?([^`\]\s]+)", cells(line)[0]).group(1)] = dict(zip(titles, cells(line), strict=True))
    return rows


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(text):
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(program):
    """The words behind a program in the documents' command lines, each line once."""
    found = {}
    for line, words in (item for text in DOCUMENTS.values() for item in command_lines(text).items()):
        at = words.index(program) + 1 if program in words else len(words)
        if words[at:] not in ([], ["..."], ["--help"]):
            found[line] = words[at:]
    return [pytest.param(words, id=line) for line, words in found.items()]


def routed_commands():
    """The words behind the package's command, as `routedvit` or `-m routedvit`: those of main.py."""
    named = [param for param in commands("routedvit") if re.match(r"routedvit |.* -m routedvit ", param.id)]
    return [param for param in named if param.values[0][0] not in ("view", "predict")]


# --- models ---------------------------------------------------------------------------------------------------------


def rounded(value, digits):
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def linked_recipe(cell):
    """The path in `[text](path)`, and the recipe there."""
    path = re.search(r"\]\(([^)]+)\)", cell).group(1)
    return path, yaml.safe_load((ROOT / path).read_text())


MODELS = table(README, "model, recipe")
RECIPES = table(section(TRAINING, "ImageNet-1K"), "model")


def test_every_model_has_a_row():
    assert set(MODELS) == {*COSTS, *SHIPPED}
    assert set(RECIPES) == set(COSTS)


@pytest.mark.parametrize("name", COSTS)
def test_costs_of_a_model(name):
    parameters, cost = COSTS[name]
    assert MODELS[name]["parameters"] == f"{parameters / 1e6:.1f} M"
    assert MODELS[name]["GMACs at 224"] == rounded(cost, 1)


@pytest.mark.parametrize("name", SHIPPED)
def test_costs_of_a_model_with_weights_of_our_own(name):
    model = timm.create_model(name, attn_impl="gather")
    parameters = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
    row = table(DOCUMENTS["weights/README.md"], "file")[f"{name}.safetensors"]
    assert MODELS[name]["parameters"] == row["parameters"] == parameters
    assert MODELS[name]["GMACs at 224"] == rounded(gmacs(model), 2)
    assert float(row["MB, float16"]) == round((ROOT / "weights" / f"{name}.safetensors").stat().st_size / 1e6, 1)


@pytest.mark.parametrize("name", SHIPPED)
def test_classes_of_our_own_weights(name):
    text = " ".join(section(DOCUMENTS["weights/README.md"], "Classes").split())
    labels = timm.get_pretrained_cfg(name).label_descriptions
    assert text.endswith(": " + ", ".join(f"{synset} {label}" for synset, label in labels.items()) + ".")


@pytest.mark.parametrize("name", COSTS)
def test_published_accuracy_is_the_same_everywhere(name):
    path, _ = linked_recipe(RECIPES[name]["recipe"])
    in_recipe = re.search(r"([\d.]+) % published", (ROOT / path).read_text()).group(1)
    assert MODELS[name]["Acc@1, published"] == RECIPES[name]["Acc@1, published"] == in_recipe


def test_the_table_of_weights_says_what_timm_knows():
    """Each model of ours stands in one row: who downloads its weights, from where, under which licence."""
    lines = section(DOCUMENTS["docs/models.md"], "Weights").splitlines()
    rows = [cells(line) for line in lines if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    families = [path.stem for path in (ROOT / "models").glob("[a-z]*.py")]
    assert sorted(names) == sorted(name for family in families for name in timm.list_models(module=family))
    for models_cell, way, source, licence in rows:
        for name in re.findall(r"`(\w+)`", models_cell):
            config = timm.get_pretrained_cfg(name)
            by_hand = "never published" if config.tag == "untrained" else "by hand"
            assert way == ("`pretrained=True` or `--load_release`" if config.has_weights else by_hand), name
            assert source.endswith(f"]({config.origin_url or '../weights/README.md'})"), name
            said = {None: "see there", "other": "[other](../weights/README.md#terms)", "mit": "MIT"}
            assert licence == said[config.license], name


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows,column", [(MODELS, "model, recipe"), (RECIPES, "recipe")], ids=["README", "TRAINING"])
def test_recipes_are_those_of_their_rows(rows, column):
    for name, row in rows.items():
        path, recipe = linked_recipe(row[column])
        # Both networks with weights of our own have one recipe.
        assert recipe["model"] == name or (name in SHIPPED and name in (ROOT / path).read_text())


def value_of(cell):
    """A number, a boolean or a word. YAML alone would read 1e-5 as a word."""
    try:
        return float(cell)
    except ValueError:
        return yaml.safe_load(cell)


NOT_FLAGS = ("Acc@1, published", "recipe")


def of_vitae(name):
    """What only ViTAE's table of TRAINING says; None for what its recipes leave out."""
    rows = table(section(TRAINING, "ViTAE"), "flag")
    found = {flag: cell for flag, row in rows.items() for names, cell in row.items() if name in names.split(", ")}
    return {flag: None if cell == "left out" else value_of(cell) for flag, cell in found.items() if cell}


@pytest.mark.parametrize("name", COSTS)
def test_recipe_is_as_described(name):
    """Everything that the tables of TRAINING say, and nothing else."""
    common = {flag: value_of(row["value"]) for flag, row in table(section(TRAINING, "ImageNet-1K"), "flag").items()}
    row = {title: value_of(cell) for title, cell in RECIPES[name].items() if title not in NOT_FLAGS}
    described = {key: value for key, value in {**common, **row, **of_vitae(name)}.items() if value is not None}
    assert described == linked_recipe(RECIPES[name]["recipe"])[1]


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The working folder: a checkout that holds the run of README, and those of the guides of tasks."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, recipe in dict(
        mine=dict(task="classification", model="biformer_nano", data_set="digits"),
        segmenter=dict(task="segmentation", model="biformer_nano", data_path="streets"),
        detector=dict(task="detection", model="biformer_nano", data_path="coco"),
    ).items():
        (tmp_path / name).mkdir()
        torch.save(dict(args=recipe), tmp_path / name / "best.pth")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("words", commands("main.py") + routed_commands())
def test_commands_are_understood(words):
    parse([word.replace("/MODEL.yaml", "/biformer_tiny.yaml") for word in words])


@pytest.mark.parametrize("words", commands("hydra_main.py"))
def test_overrides_are_understood(words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = [word.replace("${CLUSTER_ID}", "default") for word in words]
    parse_overrides([*words, f"hydra.sweep.dir={tmp_path}"], monkeypatch)


SCRIPTS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "scripts").glob("*.py"))]


@pytest.mark.parametrize("words", [param for script in SCRIPTS for param in commands(script)])
def test_scripts_have_the_flags_that_they_are_given(words, request):
    (script,) = (script for script in SCRIPTS if script in request.node.name)
    source = (ROOT / script).read_text()
    if "add_network_flags(parser" in source:
        source += (ROOT / "scripts" / "prediction" / "classifier.py").read_text()
    for word in words:
        assert not word.startswith("--") or f'"{word}"' in source, word


def test_make_has_what_it_is_asked_for():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for name, text in DOCUMENTS.items():
        in_blocks = re.findall(r"^make ([a-z-]+)", blocks(text), re.M)
        for target in in_blocks + re.findall(r"`make ([a-z-]+)`", text):
            assert target in targets, f"{name}: make {target}"


def test_evaluation_output_has_no_figures():
    """They would be read as measured here."""
    assert "* Acc@1 ACC1 Acc@5 ACC5 loss LOSS of the network on 50000 val images" in section(TRAINING, "Evaluation")


def snippets(name, heading):
    """The blocks of Python code in a section of a document."""
    return re.findall(r"^```python\n(.*?)^```", section(DOCUMENTS[name], heading), re.M | re.S)


def test_cross_validation(tmp_path, monkeypatch, capsys):
    """Every image is evaluated in one fold, and trained on in the others; classes are the same in all."""
    make_folds, summarize = snippets("TRAINING.md", "Cross-validation")
    write_photos(tmp_path, train=33, val=0)
    (tmp_path / "train").rename(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    photos = {path.relative_to("photos") for path in Path("photos").rglob("*.png")}
    renamed = {path: path.with_suffix(".jfif") for path in sorted(photos)[:2]}
    for path, other in renamed.items():
        Path("photos", path).rename(Path("photos", other))
    photos = {renamed.get(path, path) for path in photos}
    for name in (".ipynb_checkpoints/0.png", "class0/._1.png"):
        Path("photos", name).parent.mkdir(exist_ok=True)
        Path("photos", name).touch()
    exec(make_folds, {})
    evaluated = []
    for fold in sorted(Path("folds").iterdir()):
        folders = (fold / "train", fold / "val")
        parts = [{path.relative_to(folder) for path in folder.rglob("*.*")} for folder in folders]
        assert parts[0] | parts[1] == photos and not parts[0] & parts[1]
        evaluated += parts[1]
        read = [build_dataset("image_folder", fold, split) for split in ("train", "val")]
        assert [len(split) for split in read] == [len(part) for part in parts]
        assert read[0].classes == read[1].classes == ["class0", "class1", "class2"]
        counts = Counter(path.parent for path in parts[1])
        assert max(counts.values()) - min(counts.values()) <= 1
    assert sorted(evaluated) == sorted(photos) and len(list(Path("folds").iterdir())) == 5

    for fold, accuracy in enumerate((50.0, 60.0, 70.0)):
        log = Path("results", f"fold{fold}", "log.txt")
        log.parent.mkdir(parents=True)
        log.write_text(f'{{"epoch": 0, "val_acc1": 90.0}}\n{{"epoch": 1, "val_acc1": {accuracy}}}\n')
    exec(summarize, {})
    assert capsys.readouterr().out == "60.0 % of 3 runs, standard deviation 10.0\n"


# --- records --------------------------------------------------------------------------------------------------------


def test_faults_are_those_of_the_record():
    text, record = DOCUMENTS["docs/reliability.md"], (ROOT / "benchmarks" / "faults.md").read_text()
    text = text.partition("## Faults\n")[2].partition("\n## ")[0]
    rows, recorded = ([line for line in t.splitlines() if line.startswith("|")] for t in (text, record))
    assert sorted(rows) == sorted(recorded) and rows[-1] == recorded[-1]
    assert record.splitlines()[-1] in text


def test_readme_is_a_landing_page():
    assert len(README.split()) <= 1000


# --- links and paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,text", DOCUMENTS.items(), ids=list(DOCUMENTS))
def test_links_lead_somewhere(name, text):
    here = (ROOT / name).parent
    for link in re.findall(r"\]\(([^)]+)\)", without_blocks(text)):
        path, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        target = (here / path).resolve() if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(DOCUMENTS[str(target.relative_to(ROOT))]), link


# Folders whose files the documents name.
FOLDERS = "ops|models|storage|training|tasks|scripts|configs|weights|docs|notebooks|benchmarks|package|tests|.ci"


@pytest.mark.parametrize("name,text", DOCUMENTS.items(), ids=list(DOCUMENTS))
def test_paths_are_there(name, text):
    """But for those with a name for the reader to fill in, in capitals, and one that he is told to make."""
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text):
        if not re.search(r"[A-Z]{2}|/mine\.yaml$", path):
            assert (ROOT / path).exists(), path


def test_every_file_and_folder_of_the_root_is_in_the_tree():
    tree = {line.split()[0].rstrip("/") for line in section(README, "Files").splitlines() if "  " in line}
    for entry in tree:
        assert (ROOT / entry).exists(), entry
    generated = {"outputs", "data", "checkpoints", "build", "dist", "__pycache__"}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not re.match(r"\.|.*\.egg-info$", p.name)} - generated
    assert tree == folders | {path.name for path in ROOT.glob("*.py")}
