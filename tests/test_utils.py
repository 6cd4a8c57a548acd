import random

import numpy as np
import pytest
import torch

import utils
from utils import UsageError, UserError


def test_seed_everything_is_a_function_of_its_arguments():
    def draw(*key):
        utils.seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(0, 1, 2), draw(0, 2, 1), draw(1, 1, 2)}) == 3


@pytest.mark.parametrize("key, mixed", [
    ((0, 1, 2), 3071860871404845570), ((5,), 12631478326263854183), ((2**32 - 1, 3, 4, 5), 9581789998422283073),
])
def test_seeds_stay_what_they_were(key, mixed):
    """A resumed run draws what it would have drawn before: the same mix everywhere, of two widths."""
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert utils.derive_seed(*key) == mixed
    narrow = mixed % 2**32
    random.seed(narrow)
    np.random.seed(narrow)
    torch.manual_seed(narrow)
    expected = draw()
    utils.seed_everything(*key)
    assert draw() == expected
    utils.seed_generators(narrow, torch.manual_seed)
    assert draw() == expected


def test_a_name_that_does_not_exist():
    utils.check_name("model", "a", ["a"])
    many = ["model", *(f"{letter}{letter}{letter}" for letter in "abcdefghij")]
    with pytest.raises(UsageError, match=r"^unknown model 'modle'; did you mean model[?]$"):
        utils.check_name("model", "modle", many)
    with pytest.raises(UsageError, match=r"^unknown model 'xyz'$"):
        utils.check_name("model", "xyz", many)
    with pytest.raises(UsageError, match=r"^unknown model 'xyz'; choose from model, zebra$"):
        utils.check_name("model", "xyz", ["model", "zebra"])


@pytest.mark.parametrize("error,code,line", [
    (UserError("a\nb"), 1, "error: a b\n"),
    (UsageError("a"), 2, "error: a\n"),
    (OSError(2, "No such file or directory", "x"), 1, "error: x: No such file or directory\n"),
])
def test_scripts_end_with_one_line(error, code, line, capsys):
    def run():
        raise error

    assert utils.run_script(run) == code and capsys.readouterr().err == line
    assert utils.run_script(lambda: None) == 0


def test_errors_of_the_system_without_a_file_are_bugs():
    def run():
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError):
        utils.run_script(run)


@pytest.mark.parametrize("number,noun,text", [
    (1, "epoch", "1 epoch"), (0, "epoch", "0 epochs"), (12, "val image", "12 val images"), (1, "process", "1 process"),
    (2, "process", "2 processes"), (2, "batch", "2 batches"),
])
def test_a_number_of_things(number, noun, text):
    assert utils.count(number, noun) == text


def test_some_of_many():
    assert utils.some(["a", "b"]) == "a, b"
    assert utils.some(list("abcdefg"), most=5) == "a, b, c, d, e and 2 more"


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    utils.replace_file(path, lambda file: file.write(b"one"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.replace_file(path, fail)
    with pytest.raises(IsADirectoryError) as error:
        utils.replace_file(path.parent, lambda file: file.write(b"two"))
    assert error.value.filename == str(path.parent)
    assert path.read_bytes() == b"one" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_a_terminal_would_obey_is_printed_as_escapes(capsys):
    assert utils.printable("a\x1b[2J\nb\u202e\udcff \u00e9") == "a\\x1b[2J\\nb\\u202e\\udcff \u00e9"
    assert utils.fail("cannot read \x1b[2J", 1) == 1 and capsys.readouterr().err == "error: cannot read \\x1b[2J\n"


def test_a_script_that_is_interrupted_ends_with_one_line(capsys):
    def run():
        raise KeyboardInterrupt

    assert utils.run_script(run) == 130 and capsys.readouterr().err == "error: interrupted\n"


def test_an_error_does_not_fill_the_screen(capsys):
    path = "/" + 4000 * "a"  # as long as a path may be
    assert utils.fail(f"{path} is not {10**4 * '9'}", 2) == 2
    assert capsys.readouterr().err == f"error: {path} is not {100 * '9'}[...]{100 * '9'}\n"
