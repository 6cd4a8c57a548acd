import json

import pytest
import torch

from scripts import benchmark


def run(tmp_path, capsys, *arguments):
    benchmark.main([*arguments, "--rounds", "3", "--warmup", "1", "--device", "cpu", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text()), capsys.readouterr().out


def test_models(tmp_path, capsys):
    record, out = run(tmp_path, capsys, "models", "biformer_nano", "--reference", "resnet10t", "--input_size", "32",
                      "--batch_size", "2")
    assert record["machine"]["torch"] == torch.__version__ and record["settings"]["batch_size"] == 2
    assert [(r["model"], r["mode"]) for r in record["results"]] == [
        ("biformer_nano", "infer"), ("resnet10t", "infer"), ("biformer_nano", "train"), ("resnet10t", "train")
    ]
    for result in record["results"]:
        assert result["images_per_second"] == pytest.approx(2e3 / result["milliseconds"], rel=1e-6)
        assert result["peak_memory_mb"] > 0
        assert result["model"] != "resnet10t" or result["ratio"] == 1
        assert f"| {result['model']} | {result['mode']} |" in out
    inference, training = (record["results"][i]["peak_memory_mb"] for i in (0, 2))
    assert training > inference


def test_op(tmp_path, capsys):
    record, out = run(tmp_path, capsys, "op", "--batch_size", "1", "--scales", "0.25", "--modes", "train")
    assert {r["impl"] for r in record["results"]} == {"gather", "masked"}
    assert sum(r["auto"] for r in record["results"]) == 3 and out.count("(auto)") == 3


def test_peak_memory_of_the_cpu_is_that_of_the_tensors_held_at_once():
    def two_of_three():
        a = torch.empty(2**20)
        b = torch.empty(2**20)
        del a
        return b, torch.empty(2**20)

    assert benchmark.peak_memory(two_of_three, torch.device("cpu")) == pytest.approx(8, rel=0.01)


def test_mistakes(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["models", "biformer_nanoo"])
    assert "unknown model biformer_nanoo" in capsys.readouterr().err
