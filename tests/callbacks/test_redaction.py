"""Secrets are used and written nowhere."""

import re
from pathlib import Path

import pytest
import yaml

from diffusion_trainer.apps import completion, finished, submit, train
from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps.checks import check_secrets
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.sample import SampleConfig
from diffusion_trainer.callbacks.redaction import filled, literal, redacted, variables
from diffusion_trainer.conventions import UserError

SECRETS = {"STORE_TOKEN": "canary/of+a=token", "AWS_SECRET_ACCESS_KEY": "canary-of-a-key", "DB_PASSWORD": "canarypass"}


@pytest.fixture
def environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


URLS = [
    "https://user:canary-1@host/x.tar",
    "s3://user:canary%2F1@host/x.tar",
    "https://host/x.tar?X-Amz-Algorithm=A&X-Amz-Signature=canary-1&X-Amz-Date=1",
    "https://host/x.tar?sv=1&sig=canary-1",
    "https://host/x.tar?X-Goog-Signature=canary-1",
    "https://host/x.tar?access_token=canary-1",
    "pipe:curl -s 'https://user:canary-1@host/x.tar'",
    "https://ghp_canaryoftwentyletters@host/x.tar",
    "pipe:curl -H 'Authorization: Bearer canary-1' https://host/x.tar",
    "pipe:AWS_SECRET_ACCESS_KEY=canary-1 aws s3 cp s3://host/x.tar -",
    "Endpoints=https;AccountName=x;AccountKey=canary-1;Suffix=host/x.tar",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_shown_without_what_signs_it(url):
    shown = redacted(f"{url} cannot be read")
    assert "canary" not in shown
    assert "host/x.tar" in shown
    assert list(literal({"data": {"shards": [url]}})) == ["data.shards.0"]


def test_a_command_that_names_its_secrets_can_be_run_again():
    named = "https://u:${oc.env:STORE_PASSWORD}@host/x.tar?sig=${oc.env:A_KEY} https://u:$STORE_PASSWORD@host/"
    assert redacted(named) == named
    assert redacted("https://u:canary${oc.env:STORE_PASSWORD}@host/x.tar") == "https://***@host/x.tar"


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/a/x-{000..007}.tar",
        "git@host:x",
        "https://user@host/x",
        "s3://bucket/x.tar?versionId=1",
        'pipe:curl -H "Authorization: Bearer $MY_TOKEN" https://host/x.tar',
    ],
)
def test_a_url_without_secrets_is_left_alone(text):
    assert redacted(text) == text
    assert list(literal([text])) == []


@pytest.mark.parametrize("text", ["docker://a:b@sha256:0123", "https://host/x?a=1&key=$(cat f)", "A_TOKEN=$(cat f) x"])
def test_what_only_looks_like_one_is_left_alone(text):
    assert redacted(text) == text
    assert list(literal([text])) == []


def test_without_its_variable_a_reference_stays_one(monkeypatch):
    monkeypatch.delenv("STORE_TOKEN", raising=False)
    assert filled("Bearer ${oc.env:STORE_TOKEN}") == "Bearer ${oc.env:STORE_TOKEN}"


@pytest.mark.parametrize(
    "options",
    [{"secret": "canary-1"}, {"headers": {"Authorization": "Bearer canary-1"}}, {"aws_session_token": "canary-1"}],
)
def test_a_secret_among_a_librarys_options_is_found(options):
    assert len(list(literal({"store": {"storage_options": options}}))) == 1


def test_the_documented_ways_to_credentials_are_no_secrets(tmp_path):
    """Those of docs/remote.md's table, gcsfs' words for where to get them, and a path to a file of them."""
    table = Path(configuration.CONF.parent / "docs" / "remote.md").read_text().split("| URL |")[1].split("\n\n")[0]
    documented = re.findall(r"(?:storage_options=)?(\{.*?\}+)(?=`)", table)
    assert len(documented) >= 4, documented
    words = [f"{{token: {word}}}" for word in ("anon", "cloud", "cache", "browser", "google_default", __file__)]
    for text in [*documented, *words]:
        options = yaml.safe_load(text.replace("...", "'...'"))
        assert list(literal({"storage_options": options})) == [], text


def test_nothing_of_the_default_configuration_is_taken_for_a_secret():
    from diffusion_trainer.apps import train

    for more in ([], ["data=remote", "data.store.cache=c", "data.shards='https://host/x.tar'"]):
        shown = yaml.safe_load(train.show(["experiment=digits", *more]))
        assert list(literal(shown)) == []


STORE = "+data.store={_target_: diffusion_trainer.streaming.cached.CachedStore, cache_bytes: 100000000, cache: c, "
STORE += "storage_options: {%s}}"
HEADER = "headers: {Authorization: 'Bearer %s'}"
REFERRING = STORE % (HEADER % "${oc.env:STORE_TOKEN}")


def shown(*overrides: str) -> dict:
    return yaml.safe_load(train.show(["experiment=digits", *overrides]))


def test_a_configuration_has_names_and_its_parts_have_values(environment):
    config = shown(REFERRING, "data.shards=['pipe:x ${oc.env:DB_PASSWORD}','${oc.env:DB_PASSWORD}/x.tar']")
    assert config["data"]["store"]["storage_options"]["headers"]["Authorization"] == "Bearer ${oc.env:STORE_TOKEN}"
    assert not any(value in str(config) for value in SECRETS.values())
    check_secrets(config)
    store = build(config["data"]["store"], "store")
    assert store.storage_options["headers"]["Authorization"] == "Bearer canary/of+a=token"
    assert build(config["data"]["shards"], "shards") == ["pipe:x canarypass", "canarypass/x.tar"]


def test_what_is_no_secret_is_resolved_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("WORKERS", "7")
    config = shown(
        "folder=${oc.env:SCRATCH}/runs/x y",
        configuration.assignment("data.num_workers", "${oc.decode:${oc.env:WORKERS}}"),
    )
    assert config["folder"] == f"{tmp_path}/runs/x y"
    assert config["data"]["num_workers"] == 7


def test_a_variable_that_an_option_names_is_a_secret_whatever_its_name(monkeypatch):
    monkeypatch.setenv("STORE_LOGIN", "canary-of-a-login")
    config = shown(STORE % "login: '${oc.env:STORE_LOGIN}'")
    assert "canary" not in str(config)
    assert redacted("canary-of-a-login") == "canary-of-a-login"  # nobody knows yet
    build(config["data"]["store"], "store")
    assert redacted("canary-of-a-login") == "***"


@pytest.mark.parametrize(
    ("name", "value", "override"),
    [
        ("DB_PASSWORD", "training", "seed=1"),  # a word in names of classes
        ("COMET_EXPERIMENT_KEY", "digits-64-b", "name=digits-64-b"),
        ("PROJECT_KEY", "imagenet", "data.shards=imagenet/x.tar"),
        ("SSH_KEY", "/etc/passwd", STORE % "token: /etc/passwd"),
        ("X_TOKEN", "short", STORE % "token: short"),
    ],
)
def test_no_variable_changes_what_is_no_secret(monkeypatch, name, value, override):
    before = train.show(["experiment=digits", override])
    monkeypatch.setenv(name, value)
    assert train.show(["experiment=digits", override]) == before


EXPANDED = [STORE % (HEADER % "canary/of+a=token"), "data.shards='https://u:canarypass@host/x.tar'"]


@pytest.mark.parametrize("override", EXPANDED)
@pytest.mark.parametrize("show", [train.show, submit.show])
def test_a_value_that_the_shell_has_put_into_the_arguments_is_refused(environment, override, show):
    with pytest.raises(
        UserError, match=r"the value of \w+ stands there.* write '\$\{oc.env:\w+\}' in single quotes"
    ) as error:
        show(["experiment=digits", override])
    assert "canary" not in str(error.value)


@pytest.mark.parametrize("override", ["setup=['export T=canary/of+a=token']", "environment={A: 'canary/of+a=token'}"])
def test_so_is_one_for_a_jobs_script(environment, override):
    with pytest.raises(UserError, match="the value of STORE_TOKEN stands there"):
        submit.show(["experiment=digits", override])


@pytest.mark.parametrize(
    "override", ["setup=['export T=${oc.env:STORE_TOKEN}']", "environment={A: '${oc.env:STORE_TOKEN}'}"]
)
def test_a_script_names_no_secret_in_our_way(environment, override):
    with pytest.raises(UserError, match="secrets are not written into files; say '\\$NAME' in setup"):
        submit.check(["experiment=digits", override])


def same(folder: Path, config: dict) -> bool:
    folders.check(folder, config | {"resume": {"allow_config_change": False}})
    return True


def test_a_run_is_the_same_whatever_the_variables_are(monkeypatch, tmp_path):
    config = {"network": {"width": 1}, "embedding": {"storage_options": {"secret": "${oc.env:STORE_KEY}"}}}
    monkeypatch.setenv("STORE_KEY", "canary-of-a-key")
    monkeypatch.setenv("A_KEY", "canary-of-a-key")  # another of the same value
    folders.write_config(tmp_path, config)
    assert "canary" not in (tmp_path / "config.yaml").read_text()
    monkeypatch.setenv("STORE_KEY", "another-canary")
    assert same(tmp_path, config)
    monkeypatch.delenv("STORE_KEY")
    assert same(tmp_path, config)
    with pytest.raises(UserError, match="1 there, 2 here"):
        same(tmp_path, {**config, "network": {"width": 2}})


def test_the_folder_of_an_older_version_that_has_the_value_is_the_same_run(monkeypatch, tmp_path):
    monkeypatch.setenv("STORE_KEY", "canary-of-a-key")
    folders.write_config(tmp_path, {"embedding": {"storage_options": {"secret": "canary-of-a-key"}}})
    config = {"embedding": {"storage_options": {"secret": "${oc.env:STORE_KEY}"}}, "folder": str(tmp_path)}
    assert same(tmp_path, config)
    monkeypatch.setattr(completion, "at_its_end", lambda config, folder: 64)
    assert completion.trained(config)
    assert not completion.trained(config | {"embedding": None})


def test_a_word_that_appears_among_the_variables_makes_no_other_run(monkeypatch, tmp_path):
    folders.write_config(tmp_path, config := {"data": {"fields": {"image": "imagenet64"}}})
    monkeypatch.setenv("PROJECT_KEY", "imagenet64")
    assert same(tmp_path, config)


def test_without_the_variable_a_run_says_which_and_where(monkeypatch):
    monkeypatch.delenv("STORE_TOKEN", raising=False)
    with pytest.raises(UserError, match=r"export STORE_TOKEN=\.\.\. first: data\.store\..*Authorization names it"):
        check_secrets(shown(REFERRING))


def test_a_saved_configuration_needs_the_variable_only_where_shards_are_read(monkeypatch, tmp_path):
    monkeypatch.delenv("STORE_TOKEN", raising=False)
    (tmp_path / "images-1").mkdir()
    (tmp_path / "images-1" / "manifest.json").touch()
    monkeypatch.setattr(finished, "run_of", lambda checkpoint: tmp_path)
    monkeypatch.setattr(finished, "checkpoint_in", lambda folder: folder)
    folders.write_config(tmp_path, shown(REFERRING, "data.shards='pipe:x \\${NAME}'"))
    config = finished.compose("sample", [f"checkpoint={tmp_path}"], SampleConfig, finished.FROM_THE_RUN)
    assert config["data"]["shards"] == "pipe:x ${NAME}"
    store = build({**config["data"]["store"], "retries": 0}, "store")
    with pytest.raises(UserError, match=r"export STORE_TOKEN=\.\.\. first"):
        store.find("https://host.invalid/x.tar")


def test_the_environment_is_looked_through_once_and_again_when_it_changes(monkeypatch):
    before = variables()
    assert variables() is before
    monkeypatch.setenv("NEW_TOKEN", "canary-of-a-token")
    assert redacted("canary-of-a-token") == "***"
