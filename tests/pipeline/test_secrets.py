"""Secrets in the environment: refused in specs, redacted in all that is shown or recorded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import ROOT, fls, last_run

from pipeline.base.places import tracking_uri
from pipeline.base.secrets import (
    find_secret,
    has_credentials,
    is_secret,
    is_secret_variable,
    redact,
)
from pipeline.cluster.forwarding import forwarding
from pipeline.tracking import RunFacts, TrackerName, make_tracker

SECRETS = {
    "HF_TOKEN": "hf-5entinel-token",
    "DB_PASSWORD": "5entinel\\pass'word\"",
    "AWS_SECRET_ACCESS_KEY": "5entinel/secret+key",
    "DATA_URL": "https://me:5entinel%2Furl@127.0.0.1/data?sig=5entinel-signature",
}

LEAKY = '''
import os, subprocess, sys
from pathlib import Path
from pydantic import Field
from pipeline.stage import Catalogue, Output, Params, Stage, StageError, write_json

class LeakyParams(Params):
    """Of `leaky`."""
    how: str = Field("", description="how it ends")

CATALOGUE = Catalogue(
    stages=[Stage(name="leaky", entry="leaky:leaky", params=LeakyParams,
                  outputs={"number": Output(kind="number", track=True)})],
    packages=["leaky"],
)

def leaky(ctx):
    """Tell all the environment, in every way that a stage has of telling."""
    everything = str(dict(os.environ))
    print(everything)
    print(os.environ["DB_PASSWORD"], os.environ["DATA_URL"], file=sys.stderr)
    ctx.say(everything)
    ctx.record("r", {"environment": everything}, {"x": 1.0})
    ctx.record(os.environ["HF_TOKEN"], {}, {os.environ["HF_TOKEN"]: 1.0})
    ctx.log({"loss of " + os.environ["HF_TOKEN"]: 1.0})
    ctx.log({"loss of " + os.environ["HF_TOKEN"]: 1.0}, step=1)
    ctx.progress(1, 2, os.environ["HF_TOKEN"])
    if ctx.params.how == "user":
        raise StageError("cannot reach " + os.environ["DATA_URL"])
    if ctx.params.how == "bug":
        {}[os.environ["AWS_SECRET_ACCESS_KEY"]]
    if ctx.params.how == "die":
        os.write(2, everything.encode())
        os._exit(3)
    write_json(ctx.output("number") / "number.json", {"number": 1})
'''

STAGES = """name: leaky
plugins: [leaky]
stages:
  fine: {uses: leaky}
  user: {uses: leaky, params: {how: user}, retries: 0}
  bug: {uses: leaky, params: {how: bug}, retries: 0}
  die: {uses: leaky, params: {how: die}, retries: 0}
"""


@pytest.fixture
def leaky(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy's folder with the plugin `leaky`, and secrets in the environment."""
    Path("leaky.py").write_text(LEAKY)
    Path("pipeline.yaml").write_text(STAGES)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "leaky", raising=False)
    return toy


def leaks(folder: Path) -> list[str]:
    """Return the files below `folder` that hold a secret."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and b"5entinel" in path.read_bytes()
    ]


@pytest.mark.parametrize("tracking", ["jsonl", "mlflow"])
def test_no_secret_reaches_store_tracking_or_screen(leaky: Path, tracking: str) -> None:
    done = subprocess.run(  # without -W error: MLflow's import warns
        [sys.executable, "-m", "pipeline", "run", "--executor", "local", "--tracking", tracking],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    output, errors = done.stdout, done.stderr
    assert done.returncode == 1, errors
    states = {cell: status.state for cell, status in last_run().cells.items()}
    assert states == {"fine": "done", "user": "failed", "bug": "failed", "die": "failed"}
    for cell in states:
        for command in (["logs", cell], ["status", "last"]):
            code, said, wrong = fls(*command)
            assert code == 0, wrong
            output += said + wrong
    assert "***" in output
    assert "cannot reach https://***@127.0.0.1/data?sig=***" in output
    assert "KeyError: '***'" in output
    assert "5entinel" not in output + errors
    assert last_run().tracked, output
    assert leaks(leaky) == []


def test_the_search_for_leaks_finds_them(leaky: Path) -> None:
    Path("x").mkdir()
    Path("x/y").write_text(f"a{SECRETS['HF_TOKEN']}b")
    assert leaks(leaky) == ["x/y"]


def test_a_storage_with_a_password_is_never_named_with_it(
    leaky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMEWHERE", "memory://me:5entinel-storage@host/results")
    text = STAGES.partition("  user:")[0].replace("stages:", 'storage: "${env.SOMEWHERE}"\nstages:')
    Path("pipeline.yaml").write_text(text)
    for command in (["run", "--executor", "local", "--tracking", "jsonl"], ["status", "nothing"]):
        code, output, errors = fls(*command)
        assert (code, output) == (2, "")
        assert "storage: memory://***@host/results has a password in it" in errors
        assert "5entinel" not in errors
    assert leaks(leaky) == []


def test_a_tracking_server_with_a_password_is_never_named_with_it(
    leaky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:5entinel-server@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = tracking_uri(None)
    facts = RunFacts(
        run_id="r", name="n", experiment="e", uri=uri, spec_file="pipeline.yaml", spec_text=""
    )
    with pytest.raises(ConnectionError, match=r"MLflow at http://\*\*\*@127.0.0.1:9: ") as raised:
        make_tracker(TrackerName.MLFLOW).open_run(facts)
    assert "5entinel" not in str(raised.value)
    code, output, errors = fls("ui")
    assert code == 0
    assert output == "http://***@127.0.0.1:9\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('how: "${env.HF_TOKEN}"', "HF_TOKEN looks like a secret, and all values of this file are"),
        ('how: "${env.MY_API_KEY:-none}"', "MY_API_KEY looks like a secret"),
        ('how: "x${env.DB_PASSWORD}"', "DB_PASSWORD looks like a secret"),
        ('how: "${env.DATA_URL}"', "the environment variable DATA_URL holds a password or a token"),
        ("how: hf-5entinel-token", "expected no secrets, because this is recorded; got the value "),
        ("how: s3://key:whatever@bucket", "expected no secrets, because this is recorded; got a U"),
        ("how: x  # https://a.b/?token=abc", "expected no secrets, because this is recorded; got"),
    ],
)
def test_a_spec_with_a_secret_is_refused_with_its_place(
    leaky: Path, line: str, expected: str
) -> None:
    Path("pipeline.yaml").write_text(STAGES.replace("how: user", line))
    code, output, errors = fls("validate")
    assert code == 2
    assert output == ""
    (problem,) = errors.splitlines()
    place, _, message = problem.partition(": ")
    assert place.startswith("pipeline.yaml:5:")
    assert message.startswith(expected)
    assert "5entinel" not in problem
    assert "whatever" not in problem


@pytest.mark.parametrize("word", ["postgres", "password", "Airflow2024"])
def test_a_password_of_words_is_hidden_in_its_url_and_no_text_is_refused_for_it(
    leaky: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://me:{word}@host/db")
    Path("pipeline.yaml").write_text(STAGES.replace("how: user", f"how: a {word} that is none"))
    assert fls("validate")[0] == 0
    told = f"{word} at postgresql://me:{word}@host/db"
    assert redact(told) == f"{word} at postgresql://***@host/db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:correct-horse-battery@host/db")
    assert redact("correct-horse-battery") == "***"


def test_an_option_with_a_secret_is_refused_without_naming_it(leaky: Path) -> None:
    code, _, errors = fls("validate", "--set", f"user.how={SECRETS['HF_TOKEN']}")
    assert code == 2
    assert errors.startswith("--set: expected no secrets")
    assert "5entinel" not in errors


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("AWS_ACCESS_KEY_ID", True),
        ("GITHUB_TOKEN", True),
        ("MYTOKEN", True),
        ("PGPASSWORD", True),
        ("SMTP_PASS", True),
        ("DB_PWD", True),
        ("secret_thing", True),
        ("PWD", False),
        ("OLDPWD", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("KEYBOARD", False),
        ("MONKEY", False),
        ("MY_PRIVATEKEY", True),
        ("AWS_ACCESSKEY_ID", True),
        ("SESSION_COOKIE", True),
        ("RAY_AUTH_TOKEN_PATH", False),
        ("AWS_SHARED_CREDENTIALS_FILE", False),
        ("HOME", False),
        ("PATH", False),
    ],
)
def test_names_that_look_secret(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("abfs://fishleg-results-2026-production@account.dfs.core.windows.net/runs", False),
        ("az://models@account/x abfss://resultsofourpruningruns20260101@account/x", False),
        ("abfs://azureml-blobstore-550e8400-e29b-41d4-a716-446655440000@account/runs", False),
        ("sftp://someone.with-a_long-name42@host/results", False),
        ("abfs://container:key@account", True),
        ("https://ghp_16C7e42F292c6912E7710c838347Ae178B4a@host/x", True),
        ("https://glpat-xY12abCDefGH34ijKLmn@host/x", True),
        ("https://dapi0123456789abcdef0123456789abcdef@host/x", True),
        ("https://550e8400-e29b-41d4-a716-446655440000@host/x", True),
    ],
)
def test_a_long_name_is_no_token(url: str, secret: bool) -> None:
    assert has_credentials(url) is secret
    assert (redact(url, {}) == url) is not secret


def test_redaction_keeps_what_is_no_secret() -> None:
    environment = {"A_TOKEN": "long enough", "B_TOKEN": "short", "HOME": "/home/someone"}
    data = {"a": ["long enough", 3, None, True], "b": {"c": "short /home/someone long enough!"}}
    assert redact(data, environment) == {
        "a": ["***", 3, None, True],
        "b": {"c": "short /home/someone ***!"},
    }
    assert redact({"of long enough": 1, 2: 3}, environment) == {"of hidden": 1, 2: 3}
    key = {"A_KEY": "-----BEGIN KEY-----\nabcdefghijklmnopqrst\n"}
    assert redact("saw abcdefghijklmnopqrst", key) == "saw ***"
    url = "postgresql://me:pw@host/db and https://host/a?x=1&access_token=abc&y=2 sftp://me@host"
    assert redact(url, {}) == (
        "postgresql://***@host/db and https://host/a?x=1&access_token=***&y=2 sftp://me@host"
    )
    assert find_secret("x https://host:80/a?b=c#d me@host", environment) is None
    for harmless in (
        "s3://bucket/key=value/seed=1",
        "a;key=1 b",
        "x?token=y",
        "https://a/?x=1#key=2",
    ):
        assert not has_credentials(harmless)
    both = "https://a/?sig=one&x=1&api_key=two then https://b/?token=three"
    assert redact(both, {}) == "https://a/?sig=***&x=1&api_key=*** then https://b/?token=***"
    assert os.environ.get("HOME", "") in redact(os.environ.get("HOME", ""))


@pytest.mark.parametrize(
    "value",
    [
        '{"key": "AKIAEXAMPLE", "secret": "5entinel-5entinel"}',
        '{"client_kwargs": {"aws_secret_access_key": "5entinel-5entinel"}, "anon": false}',
        '{"accountKey": "5entinel-5entinel"}',
        '{"headers": {"Authorization": "Bearer 5entinel-5entinel"}}',
        '{"auth": ["me", "5entinel-5entinel"]}',
        '{"connection_string": "AccountName=a;Account' + 'Key=5entinel-5entinel"}',
        '{"endpoint_url": "http://me:5entinel-5entinel@host"}',
        "{'secret': '5entinel-5entinel'}",
        '{"secr\\u0065t": "5entinel-5entinel"}',
        '[{"token": "5entinel-5entinel"}]',
        "DefaultEndpointsProtocol=https;AccountName=a;Account" + "Key=5entinel-5entinel",
        "Endpoint=sb://host/;SharedAccess" + "Key=5entinel-5entinel",
        "postgresql://me:5entinel-5entinel@host/db",
        "https://host/x?access_token=5entinel-5entinel",
        "https://host/x?a=1&%74oken=5entinel-5entinel",
        "https://host/x?AccountKey=5entinel-5entinel",
        "postgresql://host/db?user=me&pwd=5entinel-5entinel",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D5entinel-5entinel",
    ],
)
def test_a_value_with_a_secret_in_it_is_one_whatever_its_variables_name(value: str) -> None:
    assert is_secret_variable("FSSPEC_S3", value)
    moving = forwarding({"FSSPEC_S3": value, "AWS_REGION": "eu"}, [])
    assert (moving.given, moving.secret) == ({"AWS_REGION": "eu"}, ["FSSPEC_S3"])
    assert "5entinel" not in redact(f"the environment is {value}", {"FSSPEC_S3": value})


@pytest.mark.parametrize(
    "value",
    [
        '{"anon": true, "endpoint_url": "http://minio:9000", "key": null, "secret": ""}',
        '{"client_kwargs": {"region_name": "eu"}, "key_filename": "/home/me/.ssh/id_rsa"}',
        '{"token_file": "/run/token", "tokenizer": "bpe", "monkey": "x"}',
        "{not json",
        "http://me@host:5000/?x=1",
        "s3://bucket/key=value",
        "key=value",
        "rs=0:di=01;34:*.key=00",
    ],
)
def test_a_value_without_a_secret_goes_along(value: str) -> None:
    assert not is_secret_variable("FSSPEC_S3", value)
    assert forwarding({"FSSPEC_S3": value}, []).given == {"FSSPEC_S3": value}


def test_the_secrets_in_a_variables_json_are_hidden_and_refused() -> None:
    here = {"FSSPEC_S3": '{"key": "AKIAEXAMPLE", "secret": "5entinel-5entinel", "x": "plain text"}'}
    assert redact("saw 5entinel-5entinel of AKIAEXAMPLE, plain text", here) == (
        "saw *** of ***, plain text"
    )
    assert find_secret("x: 5entinel-5entinel", here) == (
        3, "the value of the environment variable FSSPEC_S3",
    )  # fmt: skip
