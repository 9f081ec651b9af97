"""Secrets are used and written nowhere."""

import pytest
import yaml

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.callbacks.redaction import IN_URL, filled, kept, literal, redacted
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
    "text", ["https://host:8080/a/x-{000..007}.tar", "git@host:x", "s3://bucket/x.tar?versionId=1"]
)
def test_a_url_without_secrets_is_left_alone(text):
    assert redacted(text) == text
    assert not IN_URL.search(text)


def test_a_secret_is_kept_by_the_name_of_its_variable_and_used_by_its_value(environment, tmp_path):
    config = {
        "data": {
            "shards": ["https://u:canarypass@host/x.tar", "canarypassage/x.tar"],
            "storage_options": {"headers": {"Authorization": "Bearer canary/of+a=token"}, "secret": "canary-of-a-key"},
        },
        "seed": 1,
    }
    there = tmp_path / "config.yaml"
    there.write_text(configuration.dump(config))
    assert "canarypassage/x.tar" in there.read_text()  # a word that begins with one
    assert not any(value in there.read_text().replace("canarypassage", "") for value in SECRETS.values())
    read = configuration.read(there)
    assert read["data"]["storage_options"]["secret"] == "${oc.env:AWS_SECRET_ACCESS_KEY}"
    assert list(literal(read)) == []
    assert build(read, "x") == config


def test_without_its_variable_a_reference_stays_one(monkeypatch):
    monkeypatch.delenv("STORE_TOKEN", raising=False)
    assert filled("Bearer ${oc.env:STORE_TOKEN}") == "Bearer ${oc.env:STORE_TOKEN}"


@pytest.mark.parametrize(
    "options",
    [{"secret": "canary-1"}, {"headers": {"Authorization": "Bearer canary-1"}}, {"aws_session_token": "canary-1"}],
)
def test_a_secret_among_a_librarys_options_is_found(options):
    assert len(list(literal({"store": {"storage_options": options}}))) == 1


def test_paths_and_short_values_are_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("X_TOKEN", "short")
    config = {"folder": f"{tmp_path}/runs", "name": "short", "anchor": None, "steps": [1, 2.5, True]}
    assert kept(config) == config


def test_nothing_of_the_default_configuration_is_taken_for_a_secret():
    from diffusion_trainer.apps import train

    for more in ([], ["data=remote", "data.store.cache=c", "data.shards='https://host/x.tar'"]):
        shown = yaml.safe_load(train.show(["experiment=digits", *more]))
        assert list(literal(shown)) == []


def test_a_secret_that_has_changed_makes_no_other_run(monkeypatch, tmp_path):
    config = {"network": {"width": 1}, "embedding": {"storage_options": {"secret": "canary-of-a-key"}}}
    monkeypatch.setenv("STORE_KEY", "canary-of-a-key")
    folders.write_config(tmp_path, config)
    monkeypatch.setenv("STORE_KEY", "another-canary")
    config["embedding"]["storage_options"]["secret"] = "another-canary"
    folders.check(tmp_path, config | {"resume": {"allow_config_change": False}})
    with pytest.raises(UserError, match="1 there, 2 here"):
        folders.check(tmp_path, {**config, "network": {"width": 2}, "resume": {"allow_config_change": False}})
