"""What hydra_main.py makes of overrides: main.py's command line, names of folders, what sbatch gets, and errors."""
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import submitit
import yaml

import hydra_main
from helpers import ROOT
from helpers.objects import write_objects
from tasks.classification.options import ClassificationSettings
from training.flags import as_recipe
from training.options import NO_RESULT, NOT_OF_RUN
from training.parsing import Parser
from training.signals import EXIT_RESUME
from training.slurm import TIME_LIMIT_SIGNAL, minutes, sbatch_parameters
from utils import UsageError

DIGITS = ["data_set=digits", "model=biformer_nano", "input_size=32", "device=cpu", "num_workers=0"]
SBATCH = """#!/bin/sh
echo "$@" > "$(dirname "$0")/called"
cp "$1" "$(dirname "$0")/script"
echo "Submitted batch job 77"
"""


def parse(argv):
    """main.py's settings of a command line."""
    return hydra_main.program.parse(argv)[1]


@pytest.fixture
def read(monkeypatch):
    """The runs that a command line asks for."""

    def read(*words):
        monkeypatch.setattr(sys, "argv", ["hydra_main.py", *words])
        return hydra_main.read_runs()

    return read


@pytest.fixture
def argv(read):
    """The command line of main.py that overrides stand for."""
    return lambda *words: read(*words)[0].argv


@pytest.fixture
def run(monkeypatch, capfd):
    """Exit code, standard output, standard error of a command line."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["hydra_main.py", *map(str, words)])
        code = hydra_main.main()
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """A login node whose sbatch takes every job; returns the folder with what it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


# --- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line,flags",
    [
        (
            "python hydra_main.py data_path=./data/in1k input_size=224 batch_size=128 dist_eval=true "
            "+slurm=default slurm.nodes=1 slurm.ngpus=8 eval=true load_release=true model='biformer_small'",
            dict(eval=True, load_release=True, dist_eval=True, model="biformer_small"),
        ),
        (
            "python hydra_main.py data_path=./data/in1k input_size=224 batch_size=128 dist_eval=true +slurm=default "
            "slurm.nodes=1 slurm.ngpus=8 model='biformer_small' drop_path=0.15 lr=5e-4",
            dict(drop_path=0.15, lr=5e-4, input_size=224, data_path="./data/in1k"),
        ),
    ],
)
def test_the_lines_of_the_published_repository(read, line, flags):
    """With a cluster's name in the place of CLUSTER_ID."""
    (run,) = read(*shlex.split(line)[2:])
    recipe = as_recipe(run.settings)
    assert {key: recipe[key] for key in flags} == flags
    assert (run.slurm.nodes, run.slurm.ngpus) == (1, 8)


def test_every_flag_of_main_is_a_key_and_only_what_is_given_is_passed_on(argv):
    flags = [name for name in Parser(ClassificationSettings).names() if name != "local_rank"]
    assert argv() == [] and argv(*(f"{flag}=null" for flag in flags)) == [f"--{flag}=null" for flag in flags]


@pytest.mark.parametrize(
    "override,tokens",
    [
        ("lr=5e-4", ["--lr=5e-4"]),
        ("input_size=288x512", ["--input_size=288x512"]),
        ("eval=true", ["--eval=true"]),
        ("output_dir=20230307_1", ["--output_dir=20230307_1"]),  # no number
        ("model=BViT-5", ["--model=BViT-5"]),
        ("data_path=/a folder/it", ["--data_path=/a folder/it"]),
        ("data_path='/key=value, it\\'s \"quoted\"'", ["--data_path=/key=value, it's \"quoted\""]),
        ("amp=off", ["--amp=off"]),
        ("aa=none", ["--aa=none"]),
        ("min_lr=1%", ["--min_lr=1%"]),
        ("output_dir='~/x'", ["--output_dir=~/x"]),
        ("model_kwargs={ls_init_value:1e-6,a:true,b:null,c:off,d:'8'}",
         ["--model_kwargs", "ls_init_value=1e-06", "a=True", "b=None", "c='off'", "d='8'"]),
        ("scale=[0.08,1.0]", ["--scale", "0.08", "1.0"]),
        ("opt_betas=[0.9,0.95]", ["--opt_betas", "0.9", "0.95"]),
        ("clip_grad=null", ["--clip_grad=null"]),
        ("decay_epochs=[8,11]", ["--decay_epochs", "8", "11"]),
        ("extra_norms=null", ["--extra_norms=null"]),  # null is no false there
        ("train_json='~/a [1], b.json'", ["--train_json=~/a [1], b.json"]),
        ("model_kwargs={drop_rate:0.1}", ["--model_kwargs=drop_rate=0.1"]),
        ("model_kwargs={num_regions:8,topk:[1,4,-1]}", ["--model_kwargs", "num_regions=8", "topk=[1, 4, -1]"]),
        ("+model_kwargs.num_regions=8", ["--model_kwargs=num_regions=8"]),
        ("teacher_path=${data_path}", ["--teacher_path=null"]),
    ],
)
def test_values_arrive_as_they_are(argv, override, tokens):
    assert argv(override) == tokens


def test_a_detector_by_a_recipe(read, run, cluster, tmp_path):
    """Flags that no classifier has, from the overrides to the job; files of annotations are no part of a name."""
    recipe = ROOT / "configs" / "detection" / "mask_rcnn_biformer_small_1x.yaml"
    data = write_objects(tmp_path / "data")
    words = [f"config={recipe}", "detector=retinanet", "extra_norms=null", "decay_epochs=[1,2]", "epochs=3",
             f"train_json={data}/annotations/instances_train2017.json", f"data_path={data}"]
    (asked,) = read("task=detection", *words)
    given = dict(detector="retinanet", model="biformer_small", extra_norms=None, decay_epochs=[1, 2], short_side=800,
                 train_json=str(data / "annotations" / "instances_train2017.json"), recipe_batch=16)
    found = as_recipe(asked.settings)
    assert {key: found[key] for key in given} == given and asked.name == "retinanet_biformer_small"
    assert "json" not in hydra_main.run_name(asked.recipe) and "decay_epochs.1,2-" in hydra_main.run_name(asked.recipe)
    # Here, and on a cluster; the recipe says which task it is.
    small = [*words, "model=biformer_nano", "fpn_channels=8", "head_channels=null", "short_side=32", "long_side=48",
             "warmup_steps=0", "batch_size=1", "num_workers=0", "device=cpu", "max_steps=1"]
    code, out, err = run(*small, "disable_eval=true", "output_dir=here")
    assert code == 0 and "retinanet_biformer_nano: " in out, err
    code, _, err = run(*small, "+slurm=cpu", "output_dir=there")
    job = submitit.core.utils.DelayedSubmission.load(tmp_path / "there" / "slurm" / "77_submitted.pkl").function
    assert code == 0 and parse(job.argv).data == parse(asked.within(tmp_path).argv).data, err


def test_the_model_gets_its_arguments(argv):
    settings = parse(argv(*DIGITS, "model_kwargs={topk:[1,4,16],act:'a b'}", "scale=[0.5,1]"))
    assert settings.model.model_kwargs == dict(topk=[1, 4, 16], act="a b")
    assert settings.augmentation.scale == [0.5, 1.0]


def test_overrides_win_over_a_recipe_and_the_recipe_over_the_defaults(argv, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(dict(data_set="digits", drop_path=0.3, clip_grad=5.0, lr=1e-3)))
    settings = parse(argv(f"config={recipe}", "lr=2e-3", "clip_grad=null"))
    assert (settings.model.drop_path, settings.loader.batch_size) == (0.3, 128)
    assert (settings.optimizer.lr, settings.optimizer.clip_grad) == (2e-3, None)


def test_a_sweep_is_several_runs(read, tmp_path):
    sweep = ["--multirun", f"hydra.sweep.dir={tmp_path}", "lr=1e-3,5e-4", "+slurm=cpu"]
    assert [run.recipe for run in read(*sweep)] == [dict(lr="0.001"), dict(lr="0.0005")]


def test_the_runs_of_a_sweep_do_not_share_a_folder(run, passed, tmp_path):
    code, _, err = run("-m", f"hydra.sweep.dir={tmp_path}", *DIGITS, "lr=1,2", "output_dir=mine")
    assert code == 2 and "--multirun would share output_dir=mine" in err and not passed


@pytest.mark.parametrize(
    "words,message",
    [
        ("drop_pth=0.1", "unknown key drop_pth; did you mean drop_path?"),
        ("learning_rate=0.1", "unknown key learning_rate; did you mean lr?"),
        ("+drop_pth=0.1", "unknown key drop_pth; did you mean drop_path?"),
        ("lr.x=1", "Could not override 'lr.x'"),
        ("~lr", "keys cannot be deleted; lr=null restores the default"),
        ("lr=fast", "--lr: invalid float value: 'fast'"),
        ("data_path=/a=b", "data_path=/a=b: not in hydra's grammar; write a value with = , quotes"),
        ("lr=1,2", "add --multirun"),
        ("+slurm=", "+slurm= names no cluster; is the variable set? There are: cpu, default"),
        ("+slurm=nowhere", "there is no configs/slurm/nowhere.yaml; there are: cpu, default"),
        ("slurm.nodes=2", "slurm.nodes=2 needs +slurm=NAME; there are: cpu, default"),
        ("slurm=cpu", "+slurm=cpu"),
        ("+slurm=cpu slurm.nodse=2", "unknown key slurm.nodse; did you mean slurm.nodes?"),
        ("+slurm=cpu slurm.nodes=two", "slurm.nodes=two Value 'two' of type 'str' could not be converted to Integer"),
        ("+slurm=cpu slurm.nodes=0", "slurm.nodes is at least 1"),
        ("+slurm=default slurm.tasks_per_node=2", "slurm.tasks_per_node is for slurm.ngpus=0 alone"),
        ("+slurm=cpu slurm.sbatch=gres", "slurm.sbatch maps long options of sbatch to values"),
        ("+slurm=cpu slurm.time=90", 'slurm.time is "DAYS-HOURS:MINUTES:SECONDS" or "HOURS:MINUTES:SECONDS", not 90'),
        ("+slurm=cpu 'slurm.partition=\"a\nb\"'", "partition is one line of text"),
        ("+slurm=cpu model=biformer_nan", "unknown model 'biformer_nan'; did you mean biformer_nano"),
        ("+slurm=cpu batch_size=0", "--batch_size must be at least 1"),
        ("auto_resume=true", "--auto_resume needs the --output_dir"),
        ("+slurm=cpu output_dir=50%", "Slurm has its own reading of %"),
    ],
)
def test_mistakes_are_one_line_at_once(run, cluster, words, message):
    code, out, err = run(*DIGITS, *shlex.split(words))
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert not (cluster / "called").exists() and not Path("outputs").exists()


def test_an_unknown_key_in_a_cluster_file(run, cluster, tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "mine.yaml").write_text("nodse: 2\n")
    code, _, err = run("--config-dir", tmp_path, *DIGITS, "+slurm=mine")
    assert code == 2 and "Key 'nodse' not in 'Slurm'" in err and err.count("\n") == 1


# --- folders --------------------------------------------------------------------------------------------------------


def test_the_folder_is_named_by_what_was_given(argv, read):
    (run,) = read("model=biformer_small", "lr=5e-4", "data_path=/in1k", "batch_size=128", "num_workers=3",
                  "output_dir=x", "resume=y", "+slurm=cpu", "slurm.nodes=2")
    assert hydra_main.run_name(run.recipe) == "batch_size.128-lr.5e-4-model.biformer_small"
    assert hydra_main.flag_defaults().keys() | {"local_rank"} >= NO_RESULT | NOT_OF_RUN  # of one task or of several


@pytest.mark.parametrize(
    "recipe,name",
    [
        (dict(opt_betas=[0.9, 0.95]), "opt_betas.0.9,0.95"),
        (dict(config="../a b/it's.yaml"), "config..._ab_its.yaml"),
        (dict(model_kwargs=dict(act="50%")), "model_kwargs.act_50"),
        (dict(finetune="é\n"), "finetune"),
        (dict(data_path="x"), "defaults"),
    ],
)
def test_names_are_safe_anywhere(recipe, name):
    assert hydra_main.run_name(recipe).removesuffix(".") == name


def test_long_names_are_cut_and_stay_different():
    names = {hydra_main.run_name(dict(finetune="x" * 300 + end)) for end in "ab"}
    assert len(names) == 2 and all(len(name) < 255 for name in names)


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    folders = [hydra_main.make_new_folder(tmp_path / "a" / "b") for _ in range(3)]
    assert [folder.name for folder in folders] == ["b", "b-2", "b-3"]


# --- here -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def passed(monkeypatch):
    """Command lines that main.py would have run."""
    lines = []
    monkeypatch.setattr(hydra_main.program, "main", lambda argv: lines.append(argv) or 3)
    return lines


def test_here_main_runs_with_a_folder_of_that_name(run, passed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(*DIGITS, "lr=1e-3")[0] == 3
    checkpoint = parse(passed[0]).checkpoint
    name, date = Path(checkpoint.output_dir).relative_to("outputs/cls").parts
    assert name == "data_set.digits-input_size.32-lr.1e-3-model.biformer_nano" and len(date) == len("20230307-21:33:26")
    assert not checkpoint.auto_resume
    run(*DIGITS, "output_dir=mine")
    assert parse(passed[1]).checkpoint.output_dir == "mine"
    assert not list(tmp_path.iterdir())  # hydra leaves nothing behind


def test_a_recipe_may_name_the_folder(run, passed, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data_set: digits\noutput_dir: of/the/recipe\n")
    run(f"config={recipe}")
    run(f"config={recipe}", "output_dir=null")
    first, second = (parse(line).checkpoint.output_dir for line in passed)
    assert first == "of/the/recipe" and second.startswith("outputs/cls/config.")


def test_a_run_that_torchrun_restarts_gets_no_new_folder(run, passed, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(*DIGITS)
    assert passed and not any("output_dir" in word for line in passed for word in line)


def test_torchrun_neither_submits_nor_sweeps(run, passed, cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "would submit a job from every process" in run(*DIGITS, "+slurm=cpu")[2]
    assert "needs a torchrun for each" in run("-m", f"hydra.sweep.dir={tmp_path}", *DIGITS, "lr=1,2")[2]
    assert not passed and not (cluster / "called").exists()


# --- on a cluster ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,expected", [("1:00:00", 60), ("0:00:01", 1), ("36:30:00", 2190), ("2-12:00:00", 3600), ("1-00:00:30", 1441)]
)
def test_minutes(text, expected):
    assert minutes(text) == expected


def test_yaml_makes_a_number_of_a_time_without_quotes(tmp_path, read):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "mine.yaml").write_text("time: 12:00:00\n")
    (run,) = read("--config-dir", str(tmp_path), "+slurm=mine")
    with pytest.raises(UsageError, match="not 43200"):
        sbatch_parameters(run.slurm, "name", ROOT)


def test_what_sbatch_gets(read):
    (run,) = read("+slurm=default", "slurm.nodes=2", "slurm.cpus_per_task=10", "slurm.mem=480G",
                    "slurm.partition=gpu", "slurm.account=me", "slurm.qos=low", "slurm.constraint=a100",
                    "slurm.exclude='node[1-2]'", "slurm.signal_delay=300", "slurm.setup=[module load cuda]",
                    "slurm.sbatch={mail-type:END}", "slurm.job_name=mine", "slurm.time=2-00:00:00")
    text = submitit.slurm.slurm._make_sbatch_string("run", "/out", **sbatch_parameters(run.slurm, "model", ROOT))
    for option in ("nodes=2", "gpus-per-node=8", "ntasks-per-node=8", "cpus-per-task=10", "mem=480G", "partition=gpu",
                   "account=me", "qos=low", "constraint=a100", "exclude='node[1-2]'", "signal=USR1@300",
                   "mail-type=END", "job-name=mine", "time=2880", "requeue", "open-mode=append"):
        assert f"#SBATCH --{option}\n" in text
    assert "\nmodule load cuda\n" in text and "wckey" not in text
    assert "--cpus-per-task=10 --kill-on-bad-exit=1 run\n" in text  # to srun


def test_processes_without_gpus(read):
    (run,) = read("+slurm=cpu", "slurm.tasks_per_node=3")
    parameters = sbatch_parameters(run.slurm, "model", ROOT)
    assert parameters["ntasks_per_node"] == 3 and "gpus_per_node" not in parameters
    assert parameters["job_name"] == "model"


def test_a_submission(run, cluster, tmp_path):
    code, out, err = run(*DIGITS, "lr=1e-3", "+slurm=cpu")
    assert code == 0, err
    (folder,) = Path("outputs/cls/data_set.digits-input_size.32-lr.1e-3-model.biformer_nano").iterdir()
    assert out.splitlines() == [
        f"job 77 writes to {folder}", f"log:    tail -F {folder}/slurm/77_0_log.out", "state:  squeue --jobs 77",
        "cancel: scancel 77",
    ]
    job = submitit.core.utils.DelayedSubmission.load(folder / "slurm" / "77_submitted.pkl").function
    settings = parse(job.argv)
    assert (settings.checkpoint.output_dir, settings.checkpoint.auto_resume) == (str(folder), True)
    assert settings.optimizer.lr == 1e-3
    assert type(job) is hydra_main.Job and job.checkpoint().function is job
    # In a folder of the user's own, where a second run would have to say that it resumes.
    assert run(*DIGITS, "+slurm=cpu", "output_dir=mine")[0] == 0
    (tmp_path / "mine" / "last.pth").touch()
    code, _, err = run(*DIGITS, "+slurm=cpu", "output_dir=mine")
    assert code == 1 and "mine already holds a run" in err
    assert run(*DIGITS, "+slurm=cpu", "output_dir=mine", "auto_resume=true")[0] == 0


def test_within_a_job_another_is_not_submitted_as_its_part(run, cluster, monkeypatch):
    (cluster / "sbatch").write_text('#!/bin/sh\nenv > "$(dirname "$0")/called"\necho "Submitted batch job 77"\n')
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "9")
    assert run(*DIGITS, "+slurm=cpu")[0] == 0
    assert "SLURM_NTASKS" not in (cluster / "called").read_text() and os.environ["SLURM_NTASKS"] == "9"


def test_what_sbatch_refuses_leaves_no_folder(run, cluster):
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    code, out, err = run(*DIGITS, "+slurm=cpu")
    assert code == 1 and not out
    assert err == "error: sbatch did not take the job: sbatch: error: no such partition\n"
    assert not list(Path("outputs/cls").glob("*/*"))


def test_without_slurm(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = run(*DIGITS, "+slurm=cpu")
    assert code == 1 and "sbatch not found" in err and "without +slurm the run starts here" in err


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Run a job's process of some rank, whose main.py ends with some code; returns (exit code, requeues)."""

    def job(code, rank=0, squeue="RUNNING"):
        (tmp_path / "squeue").write_text(f'#!/bin/sh\n[ "$2" = --jobs=40001 ] && echo {squeue}\n')
        (tmp_path / "squeue").chmod(0o755)
        requeues, seen = [], {}
        monkeypatch.setattr(os, "environ", os.environ.copy())
        os.environ.update(
            PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="40001", SLURM_PROCID=str(rank), SLURM_LOCALID="1",
            SLURM_NTASKS="4", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node[7-8]", SUBMITIT_EXECUTOR="slurm",
            MASTER_PORT="1", RANK="9",
        )
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
        monkeypatch.setattr(
            hydra_main.program, "main", lambda argv: seen.update({n: os.environ[n] for n in names}, argv=argv) or code
        )
        monkeypatch.setattr(hydra_main, "exit_with", sys.exit)  # it would end the tests
        before = signal.signal(TIME_LIMIT_SIGNAL, lambda number, frame: requeues.append(number))
        try:
            hydra_main.Job(["--model=x"])()
            left = 0
        except SystemExit as exit:
            left = exit.code
        finally:
            signal.signal(TIME_LIMIT_SIGNAL, before)
        assert seen == dict(
            MASTER_ADDR="node7", MASTER_PORT=str(20000 + 40001 % 12768), RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK="1",
            argv=["--model=x"],
        )
        return left, len(requeues)

    return job


@pytest.mark.parametrize(
    "code,rank,squeue,left",
    [
        (0, 0, "RUNNING", (0, 0)),
        (1, 0, "RUNNING", (1, 0)),
        (1, 3, "RUNNING", (1, 0)),
        (EXIT_RESUME, 0, "RUNNING", (EXIT_RESUME, 1)),
        (EXIT_RESUME, 3, "RUNNING", (0, 0)),  # the main process does it
        (EXIT_RESUME, 0, "COMPLETING", (EXIT_RESUME, 0)),  # cancelled, or requeued by Slurm itself
    ],
)
def test_only_the_main_process_of_a_running_job_requeues_it(job, code, rank, squeue, left):
    assert job(code, rank, squeue) == left


@pytest.mark.slow
def test_a_job_runs_under_submitit_in_a_process_of_its_own(tmp_path, monkeypatch):
    """By submitit's executor of this machine, from another folder, as a job would: unpickled there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SLURM_JOB_ID", "40001")
    executor = submitit.LocalExecutor(tmp_path / "slurm")
    executor.update_parameters(stderr_to_stdout=True)
    job = executor.submit(hydra_main.Job(["--model", "nothing", "--data_set", "digits"]))
    job.wait()
    assert "error: unknown model 'nothing'" in job.stdout()


@pytest.mark.slow
def test_help_names_the_flags():
    said = subprocess.run([sys.executable, "hydra_main.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and "drop_path: 0.1" in said.stdout and "slurm: cpu, default" in said.stdout
