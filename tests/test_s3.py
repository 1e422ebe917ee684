"""Images and latent shards behind a real S3 server, moto's, through s3fs: what is there, what isn't, who may read it.

Both live in a directory of their own (`make .venv/s3`), which only processes that import this module see.
"""

import itertools
import json
import os
import re
import sys
from pathlib import Path

import fsspec
import pytest
from image_sets import KINDS, make_samples
from shard_data import make_loader, write_shards

from ldt.data.images import open_images
from ldt.data.images.blobs import open_blob
from ldt.data.shards import open_shards, open_validation, remote
from ldt.dist import free_port
from ldt.errors import InputError, RunError

import peers  # noqa: F401  isort: skip  (aiohttp is there)

sys.path.append(str(Path(__file__).parents[1] / ".venv" / "s3"))

import boto3  # isort: skip
import moto.settings  # isort: skip
import s3fs  # isort: skip
from moto.server import ThreadedMotoServer  # isort: skip

SAMPLES = make_samples(12)
COUNTS = [7, 12, 1, 10]


@pytest.fixture(scope="module", autouse=True)
def s3(tmp_path_factory):
    """fsspec's file system of the server, by what a user's environment has and nothing that this machine has."""
    none = str(tmp_path_factory.mktemp("home") / "none")
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": none,
        "AWS_SHARED_CREDENTIALS_FILE": none,
        "AWS_ACCESS_KEY_ID": "anybody",  # the server asks nobody who he is, unless a test says so
        "AWS_SECRET_ACCESS_KEY": "anything",
        "no_proxy": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        yield fs
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, None for away, as a process that starts now would find them."""

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    yield change
    s3fs.S3FileSystem.clear_instance_cache()


def upload(s3, path, name):
    """A file or all files of a directory; its address."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            s3.pipe_file(f"bucket/{name}/{file.relative_to(path)}".removesuffix("/."), file.read_bytes())
    return f"s3://bucket/{name}"


def same(source):
    assert [source.content(i) for i in range(12)] == [s[1] for s in SAMPLES]
    assert [source.label(i) for i in range(12)] == [s[2] for s in SAMPLES]
    assert [source.caption(i) for i in range(12)] == [s[3] for s in SAMPLES]
    return list(source.classes) == ["ant", "bee", "cat"]


@pytest.mark.parametrize("kind", ["directory", "web tars", "parquet", "mds", "jsonl", "zip"])
def test_every_kind_from_s3(s3, tmp_path, kind):
    path = KINDS[kind](tmp_path / "set", SAMPLES)
    address = upload(s3, tmp_path / "set", kind.replace(" ", "-"))
    assert same(open_images(address if path.is_dir() else f"{address}/{path.name}"))


def test_patterns_on_s3(s3, tmp_path):
    KINDS["web tars"](tmp_path / "set", SAMPLES, per=5)
    address = upload(s3, tmp_path / "set", "patterns")
    assert same(open_images(f"{address}/*.tar"))
    assert same(open_images(f"{address}/{{00000..00002}}.tar"))
    assert len(open_images(f"{address}/0000[02].tar")) == 7


def test_a_replaced_object_is_another_one(s3):
    """Of the same size and within the same second."""
    s3.pipe_file("bucket/replaced/one", b"one")
    before = open_blob("s3://bucket/replaced/one").stamp
    assert open_blob("s3://bucket/replaced/one").stamp == before
    s3.pipe_file("bucket/replaced/one", b"two")
    assert open_blob("s3://bucket/replaced/one").stamp != before


def test_images_that_come_later_are_seen(s3, tmp_path):
    """Put there by somebody else, of whom s3fs, which keeps its listings, hears nothing."""
    KINDS["web tars"](tmp_path / "set", SAMPLES, per=5)
    other = boto3.client("s3")
    for count, shard in enumerate(sorted((tmp_path / "set").glob("*.tar")), 1):
        other.upload_file(str(shard), "bucket", f"later/{shard.name}")
        for path in ("s3://bucket/later", "s3://bucket/later/*.tar"):
            assert len(open_images(path)) == min(5 * count, 12)


def test_images_on_s3_are_encoded_to_the_same_data(s3, tmp_path, encode, images):
    for name, path in (("here", images), ("there", upload(s3, images, "to-encode"))):
        assert encode(tmp_path / name, **{"images.path": path}) == 0
    here, there = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("here", "there"))
    assert here["fingerprint"] == there["fingerprint"]


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_training_sees_the_same_samples_from_s3(s3, tmp_path, format):
    def digests(shards):
        with make_loader(shards, batch=8, seed=5, streams=3, window=6) as loader:
            return [step.digest for step in itertools.islice(loader.steps(), 9)]

    data, cache = tmp_path / "data", str(tmp_path / "cache")
    write_shards(data, COUNTS, format)
    write_shards(data / "validation", [3], format)
    address = upload(s3, data, f"shards/{format}")
    assert digests(open_shards(address, cache)) == digests(open_shards(data))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_file()]) == len(COUNTS)
    assert open_validation(address) == f"{address}/validation"
    assert open_shards(open_validation(address), cache).manifest.samples == 3


def test_a_shard_that_is_gone_or_damaged_is_named(s3, tmp_path):
    write_shards(tmp_path / "data", COUNTS)
    address = upload(s3, tmp_path / "data", "bad")
    shards = open_shards(address, str(tmp_path / "cache"))
    first, second = (f"shard {address}/shard-0000000{i}.tar" for i in range(2))
    s3.rm_file(f"{address}/shard-00000000.tar")
    with pytest.raises(InputError, match=f"{first} is missing; restore it"):
        shards.read([0], [0])
    s3.pipe_file(f"{address}/shard-00000001.tar", b"something else")
    with pytest.raises(InputError, match=f"{second} is damaged: 14 of .* bytes came.*; restore it"):
        shards.read([1], [0])


def open_at(address, tmp_path):
    """Images, or latent shards where the address ends in `data`."""
    return open_shards(address, str(tmp_path / "cache")) if address.endswith("/data") else open_images(address)


@pytest.mark.parametrize("bucket", ["bucket", "no-bucket"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.tar", "does not exist; check the address"),
        ("none", "does not exist; check the address"),
        ("none/*.tar", "stands for no file; check the path"),
        ("none/data", "has no manifest.json; check the address or upload"),
    ],
)
def test_what_is_not_there(tmp_path, bucket, name, said):
    address = f"s3://{bucket}/{name}"
    with pytest.raises(InputError, match=re.escape(f"{address} {said}")):
        open_at(address, tmp_path)


@pytest.fixture(scope="module")
def accounts():
    """Key and secret by name: of one who may read, and of one who may do nothing."""
    iam, made = boto3.client("iam"), {}
    for name in ("reader", "stranger"):
        iam.create_user(UserName=name)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        made[name] = key["AccessKeyId"], key["SecretAccessKey"]
    may = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [may]})
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
    return made | {"unknown": ("AKIAUNKNOWN", "x"), "guesser": (made["reader"][0], "x"), "nobody": (None, None)}


@pytest.mark.parametrize("who", ["reader", "stranger", "unknown", "guesser", "nobody"])
def test_who_may_read(s3, tmp_path, monkeypatch, environment, accounts, who):
    KINDS["web tars"](tmp_path / "set", SAMPLES)
    write_shards(tmp_path / "data", COUNTS)
    upload(s3, tmp_path / "set", "private/set")
    upload(s3, tmp_path / "data", "private/data")
    key, secret = accounts[who]
    environment(AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret)
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from now on the server asks
    for name in ("set", "set/00000.tar", "set/*.tar", "data"):
        address = f"s3://bucket/private/{name}"
        if who == "reader":
            open_at(address, tmp_path)
            continue
        with pytest.raises(InputError, match=f"{re.escape(address)}.* may not be read .*; check the credentials of"):
            open_at(address, tmp_path)


@pytest.mark.parametrize(
    "profile",
    ["[default]", "[profile mine]\nsso_start_url=http://none\nsso_region=x\nsso_account_id=1\nsso_role_name=x"],
    ids=["not there", "not logged in"],
)
def test_a_profile_that_is_not_there_or_not_logged_in(tmp_path, environment, profile):
    (tmp_path / "config").write_text(profile)
    environment(AWS_PROFILE="mine", AWS_CONFIG_FILE=str(tmp_path / "config"), AWS_ACCESS_KEY_ID=None)
    for name in ("set.tar", "data"):
        with pytest.raises(InputError, match=f"s3://bucket/{name}.* may not be read .*; check the credentials of"):
            open_at(f"s3://bucket/{name}", tmp_path)


@pytest.mark.parametrize("name", ["set.tar", "data"])
def test_a_server_that_does_not_answer(tmp_path, monkeypatch, environment, name):
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # each attempt of ours is otherwise 25 of theirs
    environment(AWS_MAX_ATTEMPTS="1", AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RunError, match=f"s3://bucket/{name}.* could not be read in 5 attempts .*; check the address"):
        open_at(f"s3://bucket/{name}", tmp_path)
