"""Mistakes get one readable message with the fix, exit code 2, no traceback, and nothing is lost."""

import json
import shutil

import pytest
import tiny
from conftest import SMALL
from written_runs import config_of, write_run

from diffusion_trainer.apps import cli as console
from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.indexing import index
from diffusion_trainer.streaming.writer import write_shards

DIGITS = ["train", "experiment=digits", *SMALL]


@pytest.fixture
def refused(workplace, monkeypatch):
    """refused(*arguments) -> the message of the UserError; no run folder may have appeared."""
    monkeypatch.chdir(workplace)

    def run(*arguments: str) -> str:
        with pytest.raises(UserError) as error:
            console.run(list(arguments))
        return str(error.value)

    return run


@pytest.mark.parametrize(
    ("override", "say"),
    [
        ("optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("num_image=5", "did you mean num_images?"),
        ("trainer.max_stepz=3", "no option trainer.max_stepz"),
        ("++trainer.max_stepz=3", "trainer.max_stepz: there is no such option"),
        ("+sede=3", "did you mean seed?"),
        ("schedule=cosin", "did you mean cosine?"),
        ("strategy=zero4", "one of ddp, single, zero1, zero2, zero2_offload, zero3"),
        ("sampler.num_step=3", "did you mean sampler.num_steps?"),
        ("num_steps=3", "did you mean sampler.num_steps?"),
        ("num_images=many", "num_images=many: input should be a valid integer"),
        ("optimizer.lr=fast", "optimizer.lr=fast: input should be a valid number"),
        ("network.channel_multipliers=2", "network.channel_multipliers=2: input should be"),
        ("precision=fp64", "precision=fp64: input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("optimizer.lr=-1", "optimizer: lr and eps must be positive"),
        ("sampler.solver.eta=2", "sampler.solver: eta must lie in [0, 1], not 2"),
        ("schedule.t_max=2", "schedule: 0 < t_min < t_max < 1"),
        ("network.groups=7", "network: every level's channels"),
        ("network.channel_multipliers=[1,1,1,1,1]", "do not halve"),
        ("conditioning.num_classes=5", "is out of range: the model has 5 classes"),
        ("data.fields.label=null", "the conditioning reads label"),
        ("data.fields.image.channels=3", "evaluation.reference has images (1, 8, 8), data has (3, 8, 8)"),
        ("data.fields.image.height=9", "shards/digits/train-000000.tar, sample 0 (wrong_shape)"),
        ("batch_size=15", "batch_size=15 does not divide over 2 processes"),
        ("lanes=3", "lanes=3 must divide batch_size=16"),
        ("batch_size=0", "batch_size must be positive"),
        ("trainer.processes=3", "batch_size=16 does not divide over 3 processes"),
        ("trainer.accelerator=cuda", "no CUDA device"),
        ("data.shards=nowhere/*.tar", "no file matches nowhere/*.tar"),
        ("evaluation.features=none.pt", "evaluation.features: none.pt is not a TorchScript file"),
        ("evaluation.features=shards/digits/digits.json", "is not a TorchScript file"),
        ("condition_dropout=1.5", "condition_dropout must lie in [0, 1]"),
        ("optimizer.lr=1,2", "several values are a sweep"),
        ("~optimizer", "nothing can be deleted"),
        ("schedule._target_=os.system", "schedule._target_: os.system is outside diffusion_trainer"),
        ("schedule._target_=diffusion_trainer.apps.processes.subprocess.Popen", "there is no"),
        ("schedule._target_=diffusion_trainer.streaming.stores.Path", "is not a class of diffusion_trainer"),
        ("lr", "cannot read the arguments"),
        ("data.shards=shards/digits", "shards/digits is a folder; name its files: shards/digits/*.tar"),
        ("network=null", "network is one of unet, unet_small"),
        ("optimizer.lr=nan", "optimizer: lr and eps must be positive"),
        ("guidance.scale=nan", "scale must not be negative"),
        ("num_images=1e4", "write 10000"),
        ("name=5", "quote it: name='\"5\"'"),
        ("optimizer.betas=0.9", "should be a valid list"),
        ("folder=/proc/x", "folder=/proc/x cannot be written"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(refused, workplace, override, say):
    if override == "trainer.accelerator=cuda":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    message = refused(*DIGITS, override)
    assert say in message
    assert "Traceback" not in message
    assert not (workplace / "runs").exists()


COARSE = [("bf16", "bfloat16"), ("fp16", "float16")]


@pytest.mark.parametrize(("precision", "dtype"), COARSE)
def test_tolerances_that_a_precision_cannot_meet_are_refused_before_it_trains_or_loads(
    refused, workplace, precision, dtype
):
    """Not at the first evaluation, after hours, nor once the weights are read."""
    why = f": rtol=1e-05 and atol=1e-05 of dopri5 cannot be met in torch.{dtype}"
    assert f"sampler.solver{why}" in refused(*DIGITS, "sampler=dopri5", f"precision={precision}")
    _, folder = write_run(workplace / "runs" / "made", config_of(["experiment=digits"]))
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"")  # read, it would be what is wrong
    common = ["checkpoint=runs/made", f"precision={precision}"]
    assert f"sampler.solver{why}" in refused("sample", *common, "sampler=dopri5")
    assert f"sampler.solver{why}" in refused("sample", *common, "sampler=dopri5", "mode=invert")
    for likelihood in ("flow", "flow_uniform", "flow_variational"):
        assert f"likelihood{why}" in refused("likelihood", *common, f"likelihood={likelihood}")
    assert f"sampler.solver{why}" in refused("evaluate", *common, "sampler=dopri5")


def test_all_mistakes_are_reported_at_once(refused):
    message = refused(*DIGITS, "++trainer.max_stepz=3", "num_images=many", "++ema.half=1", "optimizer.lr=fast")
    for part in ("trainer.max_stepz", "num_images=many", "ema.half", "optimizer.lr=fast"):
        assert part in message


def test_a_missing_value_is_asked_for(refused):
    assert "data.shards is missing: say data.shards=..." in refused("train")


@pytest.mark.parametrize(
    ("without", "say"),
    [
        ("condition_dropout=0", "with condition_dropout=0 the model is never trained without its condition"),
        ("conditioning=none", "the model has no condition, so nothing to guide it to"),
    ],
)
def test_guidance_away_from_what_is_never_trained_is_refused(refused, without, say):
    assert say in refused(*DIGITS, without, "guidance.scale=2")


def test_more_processes_than_the_strategy_has_are_refused(refused, monkeypatch):
    """As torchrun or srun would start them: two models of one process each, in one folder, otherwise."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "2 processes were started, this strategy has 1" in refused(*DIGITS, "strategy=single")
    assert "trainer.processes=4, but srun or torchrun has started 2" in refused(*DIGITS, "trainer.processes=4")


def test_ranks_that_do_not_fit_their_nodes_are_refused(refused, monkeypatch):
    """Both would take themselves for rank 0, and wait for each other."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    said = refused(*DIGITS, "strategy=ddp")
    assert "RANK=1 LOCAL_RANK=0 contradict GROUP_RANK=0 (or NODE_RANK) and LOCAL_WORLD_SIZE=2" in said


def test_verbs_and_flags_are_explained(refused):
    assert "the verbs are train, submit, doctor, sample" in refused("trian")
    assert "there is no such flag" in refused("train", "--sweep")


def test_shards_without_labels_and_empty_ones_are_named(refused, workplace, digits):
    (sample,) = tiny.samples(1)
    del sample["cls"]
    write_shards([sample], workplace / "bad", "x", 10)
    said = refused(*DIGITS, "data.shards=bad/x-*.tar")
    assert "bad/x-000000.tar, sample 0 (missing_field): it has no .cls, only .png" in said
    empty = workplace / "empty" / "x.tar"
    empty.parent.mkdir()
    empty.write_bytes(b"\0" * 10240)
    assert "x.tar has no index; make it: diffusion-trainer index 'empty/*.tar'" in refused(
        *DIGITS, "data.shards=empty/*.tar"
    )
    index([empty], 1)
    assert "there are no samples" in refused(*DIGITS, "data.shards=empty/*.tar")


def test_a_folder_of_strangers_is_left_alone(refused, workplace):
    (workplace / "runs" / "digits").mkdir(parents=True)
    (workplace / "runs" / "digits" / "thesis.tex").write_text("mine")
    assert "holds no run (thesis.tex" in refused(*DIGITS)
    assert (workplace / "runs" / "digits" / "thesis.tex").read_text() == "mine"


@pytest.mark.slow
def test_a_mistake_exits_with_2_and_no_traceback(cli):
    code, output = cli(*DIGITS, "optimizer.lrr=1")
    assert code == 2
    assert output == "error: optimizer.lrr=1: there is no option optimizer.lrr; did you mean optimizer.lr?\n"


# ---- after a run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def after(trained, monkeypatch):
    monkeypatch.chdir(trained)

    def run(*arguments: str) -> str:
        with pytest.raises(UserError) as error:
            console.run(list(arguments))
        return str(error.value)

    return run


@pytest.mark.slow
def test_another_run_in_the_same_folder_is_shown_as_a_difference(after):
    message = after(*DIGITS, "strategy=single", "optimizer.lr=0.5", "network.base_channels=32")
    assert "runs/digits holds another run" in message
    assert "optimizer.lr: 0.002 there, 0.5 here" in message
    assert "network.base_channels: 16 there, 32 here" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "say"),
    [
        (["sample", "checkpoint=runs/digits", "label=10"], "label 10 is out of range: the model has 10 classes"),
        (["sample", "checkpoint=runs/digits", "label=-1"], "label -1 is out of range"),
        (["sample", "checkpoint=runs/digits", "n=0"], "must be positive"),
        (["sample", "checkpoint=runs/digits", "guidance.scal=2"], "did you mean guidance.scale?"),
        (["sample", "checkpoint=runs/digits", "label=seven"], "label=seven: input should be a valid integer"),
        (["sample", "checkpoint=runs/digits", "network.base_channels=32"], "is of another architecture"),
        (["sample"], "checkpoint is missing: say checkpoint=runs/<name>"),
        (["sample", "checkpoint=runs/none"], "there is no checkpoint"),
        (["evaluate", "checkpoint=runs/digits", "evaluation.features=no.pt"], "is not a TorchScript file"),
        (["evaluate", "checkpoint=runs/digits", "evaluation=none"], "this run has no evaluation"),
        (["sample", "checkpoint=runs/digits", "out=/proc/x"], "out=/proc/x cannot be written"),
        ([*DIGITS, "strategy=single", "num_images=16"], "is at 32 images already; num_images is less"),
    ],
)
def test_a_mistake_with_a_checkpoint_is_explained(after, arguments, say):
    assert say in after(*arguments)


def _damage_shorten(file):
    file.write_bytes(file.read_bytes()[:-100])


def _damage_header(file):
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def _damage_remove(file):
    file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [_damage_shorten, _damage_header, _damage_remove])
def test_a_damaged_checkpoint_is_named(after, trained, tmp_path, damage):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    (file,) = (tmp_path / "runs" / "digits" / "checkpoints").glob("images-*/rank-00000.safetensors")
    damage(file)
    message = after("sample", f"checkpoint={tmp_path}/runs/digits")
    assert "rank-00000.safetensors" in message
    assert "damaged" in message or "not a whole checkpoint" in message


@pytest.mark.slow
def test_a_hostile_configuration_beside_a_checkpoint_runs_nothing(after, trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    config = tmp_path / "runs" / "digits" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("diffusion_trainer.process.schedules.Cosine", "os.system"))
    assert "os.system is outside diffusion_trainer" in after("sample", f"checkpoint={tmp_path}/runs/digits")
    config.write_text(f"!!python/object/apply:os.system ['touch {tmp_path}/hacked']")
    assert "cannot be read" in after("sample", f"checkpoint={tmp_path}/runs/digits")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.slow
def test_metrics_carry_their_provenance(trained):
    report = json.loads((trained / "runs" / "digits" / "metrics.json").read_text())
    assert set(report["metrics"]) == {"fid", "pixel_fd", "accuracy"}
    for key in (
        "weights", "num_samples", "seed", "reference", "features", "sampler", "guidance", "ema", "versions",
        "precision", "compile", "channels_last",
    ):  # fmt: skip
        assert key in report["provenance"], key
