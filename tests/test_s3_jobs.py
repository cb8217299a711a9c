"""Jobs whose images and results lie in S3: the real client, and moto's server on this machine."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import pytest
from job_rows import rows_in
from PIL import Image

from comask.data.shapes import ShapesSource
from comask.runtime.jobs.folder import Folder
from comask.runtime.jobs.job import Row

pytestmark = pytest.mark.slow

parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs comask[jobs]")

REPORT = Path(sys.prefix) / "s3"  # of install_s3.py
READY = 60  # seconds that the server may take to be ready
ENDED = 180  # seconds that a command may take; one without a storage tries for a while
NOBODY = "http://127.0.0.1:1"  # where no server is
# moto believes whoever comes, but wants to be told a name
SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=anyone/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}
S3 = "{http://s3.amazonaws.com/doc/2006-03-01/}"
BROKEN = ("cut.png", "text.png", "zero.jpg")
# what addresses, patterns and requests write in other ways
ODD = ("a b.png", "ü+ö.png", "plus+sign.png", "100%25.png", "what?.png", "no#1.png", "[1].png")


@dataclass(frozen=True)
class Written:
    """An object as a listing has it.

    Attributes:
        etag: of its content.
        modified: when it was written, to the second.
        size: bytes.
    """

    etag: str
    modified: str
    size: int


@dataclass(frozen=True)
class Server:
    """A server of S3 on this machine.

    Attributes:
        python: of the environment that it and the commands run in.
        port: where it listens.
    """

    python: Path
    port: int

    def ask(
        self, method: str, path: str, content: bytes = b"", query: str = "", status: int = 200
    ) -> bytes:
        """What the server says to a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=READY)
        try:
            headers = SIGNED | {"Content-Type": "application/octet-stream"}
            connection.request(method, f"/{quote(path)}{query}", content, headers)
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status == status, (method, path, said)
            return said
        finally:
            connection.close()

    def put(self, path: str, content: bytes = b"") -> None:
        """Writes an object, or makes a bucket."""
        self.ask("PUT", path, content)

    def get(self, path: str) -> bytes:
        return self.ask("GET", path)

    def delete(self, path: str) -> None:
        self.ask("DELETE", path, status=204)

    def buckets(self) -> list[str]:
        names = ElementTree.fromstring(self.ask("GET", "")).iter(f"{S3}Name")
        return [str(name.text) for name in names]

    def objects(self, bucket: str, prefix: str = "") -> dict[str, Written]:
        """What lies in a bucket, by key."""
        listing = self.ask("GET", bucket, query=f"?list-type=2&prefix={quote(prefix)}")
        found = {}
        for entry in ElementTree.fromstring(listing).iter(f"{S3}Contents"):
            told = {str(field.tag).removeprefix(S3): field.text or "" for field in entry}
            found[told["Key"]] = Written(told["ETag"], told["LastModified"], int(told["Size"]))
        assert len(found) < 1000  # of a page
        return found

    def rows(self, bucket: str, job: str) -> list[Row]:
        """All rows of a job's parts, in order."""
        found: list[Row] = []
        for key in sorted(self.objects(bucket, f"{job}/parts/")):
            found += parquet.read_table(io.BytesIO(self.get(f"{bucket}/{key}"))).to_pylist()
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """In this block it knows nobody."""
        self.ask("POST", "moto-api/reset-auth", b"0")
        try:
            yield
        finally:
            self.ask("POST", "moto-api/reset-auth", b"inf")

    @property
    def environment(self) -> dict[str, str]:
        """For a command: of this server, and nothing of whoever runs the tests."""
        return {name: value for name, value in os.environ.items() if name[:4] != "AWS_"} | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONUTF8": "1",
        }

    def start(self, *arguments: object, **changes: str) -> subprocess.Popen[str]:
        """Begins a job of `--runner local`, with changes to its environment."""
        return subprocess.Popen(
            [str(self.python.with_name("comask")), "job", *map(str, arguments)],
            env=self.environment | changes, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding="utf-8",
        )  # fmt: skip

    def run(self, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        """The same, when it has ended."""
        with ending(self.start(*arguments, **changes)) as process:
            output, errors = process.communicate(timeout=ENDED)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Ends a command where the test has not."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    told = REPORT.read_text().strip() if REPORT.is_file() else ""
    if not Path(told).is_absolute():
        pytest.skip(told or "no S3 server: tests/install_s3.py gets one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = Server(Path(told) / "bin" / "python", free.getsockname()[1])
    log = tmp_path_factory.mktemp("s3") / "log"
    command = [server.python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(server.port)]
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            deadline = time.monotonic() + READY
            while not _listens(server.port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield server
        finally:
            process.kill()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """24 sound images, some with odd names, and three that are none, by name."""
    source = ShapesSource(num_images=24, seed=4)
    names = [*ODD, *(f"{i:02}.png" for i in range(24 - len(ODD)))]
    made = {}
    for index, name in enumerate(names):
        file = io.BytesIO()
        Image.fromarray(source.image(index)).save(file, "PNG")
        made[name] = file.getvalue()
    made |= {"zero.jpg": b"", "text.png": b"no image", "cut.png": made["00.png"][:300]}
    return made


@pytest.fixture(scope="module")
def expected(
    server: Server,
    pictures: dict[str, bytes],
    micro_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Row]:
    """What the same job finds in a local folder, by name."""
    scratch = tmp_path_factory.mktemp("local")
    (scratch / "images").mkdir()
    for name, content in pictures.items():
        (scratch / "images" / name).write_bytes(content)
    ended = server.run(micro_bundle, scratch / "images", "--output", scratch / "job")
    assert ended.returncode == 1, ended.stderr
    found = by_name(rows_in(Folder(str(scratch / "job"))), f"{scratch}/images/")
    assert sum(len(row["detections"] or ()) for row in found.values()) > 0
    return found


@pytest.fixture
def bucket(server: Server, pictures: dict[str, bytes]) -> Iterator[str]:
    """Of a test, with the images under `images/`, and a text."""
    name = f"bucket-{uuid4().hex}"
    server.put(name)
    for picture, content in pictures.items():
        server.put(f"{name}/images/{picture}", content)
    server.put(f"{name}/images/notes.txt", b"no image, and no job's business")
    yield name
    for key in server.objects(name):
        server.delete(f"{name}/{key}")
    server.delete(name)


def by_name(rows: list[Row], folder: str) -> dict[str, Row]:
    """Rows by the image's name in a folder, and without the folder's; each image once."""
    found = {}
    for row in rows:
        name = row["file"].removeprefix(folder)
        assert name not in found, f"{name} twice"
        found[name] = row | {"file": name, "error": row["error"] and reason(row)}
    return found


def reason(row: Row) -> str:
    """Why an image could not be run, without its address."""
    error, address = row["error"], f"{row['file']}: "
    assert error.startswith(address), error
    return str(error.removeprefix(address))


def assert_same(found: dict[str, Row], expected: dict[str, Row]) -> None:
    """Compares all but the reasons."""
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert (found[name]["error"] is None) == (row["error"] is None), name
        assert found[name] | {"error": None} == row | {"error": None}


def wait_for(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    """Waits while a command runs; it may not have ended by then."""
    deadline = time.monotonic() + ENDED
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_one_error(ended: subprocess.CompletedProcess[str], words: str) -> None:
    """One line says what is wrong, with these words in it."""
    assert (ended.returncode, ended.stdout) == (1, ""), ended
    assert ended.stderr.startswith("error: "), ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert words in ended.stderr


def test_a_job_from_s3_to_s3_finds_what_it_finds_on_a_disk(
    server: Server, bucket: str, expected: dict[str, Row], micro_bundle: Path
) -> None:
    job = f"s3://{bucket}/job"
    ended = server.run(micro_bundle, f"s3://{bucket}/images", "--output", job, "--shard", 4)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout.startswith("24 of 27 images, "), ended.stdout
    assert ended.stderr.count("skipped: ") == 3, ended.stderr
    assert "Traceback" not in ended.stderr
    found = by_name(server.rows(bucket, "job"), f"s3://{bucket}/images/")
    assert_same(found, expected)
    assert {name for name, row in found.items() if row["error"]} == set(BROKEN)
    failures = server.get(f"{bucket}/job/failures.jsonl").decode().splitlines()
    assert [json.loads(line)["file"] for line in failures] == [
        f"s3://{bucket}/images/{name}" for name in BROKEN
    ]
    summary = json.loads(server.get(f"{bucket}/job/summary.json"))
    assert (summary["images"], summary["failed"], summary["parts"]) == (27, 3, 7)

    before = server.objects(bucket)
    again = server.run(
        micro_bundle, f"@{job}/inputs.jsonl", "--output", job, "--shard", 4, "--json", "-"
    )
    assert (again.returncode, "finished already" in again.stderr) == (1, True), again.stderr
    assert json.loads(again.stdout) == summary
    assert server.objects(bucket) == before


def test_a_killed_job_continues_in_s3_and_writes_no_part_again(
    server: Server, bucket: str, expected: dict[str, Row], micro_bundle: Path
) -> None:
    job = (micro_bundle, f"s3://{bucket}/images", "--output", f"s3://{bucket}/job", "--shard", 2)
    with ending(server.start(*job)) as process:
        wait_for(process, lambda: len(server.objects(bucket, "job/done/")) >= 2)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.communicate()
    before = server.objects(bucket, "job/")
    done = [key for key in before if key.startswith("job/done/")]
    assert 2 <= len(done) < 14
    assert "job/summary.json" not in before
    for key in before:
        content = server.get(f"{bucket}/{key}")
        if key.startswith("job/parts/"):  # whole, or it could not be read
            assert 1 <= len(parquet.read_table(io.BytesIO(content))) <= 2
        elif key != "job/inputs.jsonl":
            json.loads(content)

    time.sleep(1)  # for times, which are told to the second
    ended = server.run(*job)
    assert ended.returncode == 1, ended.stderr
    assert f"continues: {2 * len(done)} of 27 images are done" in ended.stderr
    after = server.objects(bucket, "job/")
    for key in done:
        number = Path(key).stem
        for kept in (key, f"job/parts/{number}.parquet", "job/inputs.jsonl", "job/job.json"):
            assert after[kept] == before[kept]
    assert len(after) == 2 * 14 + len(("inputs", "job", "failures", "summary"))
    assert_same(by_name(server.rows(bucket, "job"), f"s3://{bucket}/images/"), expected)


def test_the_same_job_twice_at_the_same_time_is_one_job(
    server: Server, bucket: str, expected: dict[str, Row], micro_bundle: Path
) -> None:
    job = (micro_bundle, f"s3://{bucket}/images", "--output", f"s3://{bucket}/job", "--shard", 2)
    with ending(server.start(*job)) as first, ending(server.start(*job)) as second:
        for process in (first, second):
            output, errors = process.communicate(timeout=ENDED)
            assert process.returncode == 1, errors
            assert output.startswith("24 of 27 images, "), errors
    assert_same(by_name(server.rows(bucket, "job"), f"s3://{bucket}/images/"), expected)


def test_a_pattern_finds_images_at_any_depth(
    server: Server, bucket: str, pictures: dict[str, bytes], micro_bundle: Path, tmp_path: Path
) -> None:
    below = {"tree/top.png", "tree/a/x y.png", "tree/a/b/ü+.png", "tree/a/b/[1].png"}
    for key in (*below, "tree/a/b/no.jpg", "trees/other.png"):
        server.put(f"{bucket}/{key}", pictures["00.png"])
    for key in ("tree/", "tree/a/", "tree/empty/"):  # as consoles make folders
        server.put(f"{bucket}/{key}")
    for number, (text, keys) in enumerate(
        [
            ("tree/**/*.png", below),
            ("tree", {"tree/top.png"}),
            ("tree/", {"tree/top.png"}),
            ("tree*/*.png", {"tree/top.png", "trees/other.png"}),
            ("tree/a/b/[1].png", {"tree/a/b/[1].png"}),
        ]
    ):
        job = tmp_path / f"{number}"
        ended = server.run(micro_bundle, f"s3://{bucket}/{text}", "--output", job)
        assert ended.returncode == 0, (text, ended.stderr)
        names = [row["file"] for row in rows_in(Folder(str(job)))]
        assert sorted(names) == sorted(f"s3://{bucket}/{key}" for key in keys), text


def test_an_image_that_is_removed_meanwhile_is_reported(
    server: Server, bucket: str, expected: dict[str, Row], micro_bundle: Path
) -> None:
    last = max(name for name in expected if name.isascii())
    job = (micro_bundle, f"s3://{bucket}/images", "--output", f"s3://{bucket}/job", "--shard", 2)
    with ending(server.start(*job)) as process:
        wait_for(process, lambda: bool(server.objects(bucket, "job/done/")))
        process.send_signal(signal.SIGSTOP)
        assert len(server.objects(bucket, "job/done/")) < 13, "the last part has begun"
        server.delete(f"{bucket}/images/{last}")
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=ENDED)
    assert process.returncode == 1, errors
    missing = f"skipped: s3://{bucket}/images/{last}: cannot be read: No such file or directory"
    assert missing in errors
    found = by_name(server.rows(bucket, "job"), f"s3://{bucket}/images/")
    assert found.pop(last)["error"] == "cannot be read: No such file or directory"
    assert_same(found, {name: row for name, row in expected.items() if name != last})


def test_a_bucket_or_folder_that_does_not_exist_is_said_in_one_line(
    server: Server, bucket: str, micro_bundle: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    for inputs, words in [
        ("s3://mistyped/images", "s3://mistyped/images: no such file or folder"),
        ("s3://mistyped/a.png", "s3://mistyped/a.png: no such file or folder"),
        ("s3://mistyped/**/*.png", "s3://mistyped/**/*.png: "),
        ("@s3://mistyped/list.txt", "@s3://mistyped/list.txt: no such list"),
        (f"s3://{bucket}/none", f"s3://{bucket}/none: no such file or folder"),
        (f"s3://{bucket}/*.png", "no file matches it"),
    ]:
        assert_one_error(server.run(micro_bundle, inputs, "--output", job), words)
    assert not job.exists()


def test_a_job_makes_no_bucket(server: Server, bucket: str, micro_bundle: Path) -> None:
    before = server.buckets()
    image = f"s3://{bucket}/images/00.png"
    ended = server.run(micro_bundle, image, "--output", "s3://mistyped/job")
    made = set(server.buckets()) - set(before)
    for name in made:  # else the other tests would find it
        for key in server.objects(name):
            server.delete(f"{name}/{key}")
        server.delete(name)
    assert not made
    assert_one_error(ended, "s3://mistyped/job")


def test_a_storage_that_lets_nobody_in_is_said_in_one_line(
    server: Server, bucket: str, micro_bundle: Path, tmp_path: Path
) -> None:
    local = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(local)
    images, job = f"s3://{bucket}/images", tmp_path / "job"
    with server.locked():
        for inputs, output, words in [
            (images, job, f"{images}: cannot be listed: The AWS Access Key Id you provided"),
            (f"s3://{bucket}/**/*.png", job, "cannot be listed: Forbidden"),
            (local, f"s3://{bucket}/job", f"s3://{bucket}/job/job.json: cannot be read: Forbidden"),
        ]:
            assert_one_error(server.run(micro_bundle, inputs, "--output", output), words)
    assert not job.exists()
    assert not server.objects(bucket, "job/")


def test_a_storage_that_is_down_is_said_in_one_line_and_in_time(
    server: Server, micro_bundle: Path, tmp_path: Path
) -> None:
    local, job = tmp_path / "a.png", tmp_path / "job"
    Image.new("RGB", (32, 32)).save(local)
    for inputs, output in [("s3://bucket/images", job), (local, "s3://bucket/job")]:
        ended = server.run(micro_bundle, inputs, "--output", output, AWS_ENDPOINT_URL=NOBODY)
        assert_one_error(ended, "Could not connect to the endpoint URL")
    assert not job.exists()


def test_a_list_that_cannot_be_reached_is_not_said_to_be_missing(
    server: Server, bucket: str, micro_bundle: Path, tmp_path: Path
) -> None:
    server.put(f"{bucket}/list.txt", f"s3://{bucket}/images/00.png\n".encode())
    job = (micro_bundle, f"@s3://{bucket}/list.txt", "--output", tmp_path / "job")
    with server.locked():
        assert_one_error(server.run(*job), "Forbidden")
    ended = server.run(*job, AWS_ENDPOINT_URL=NOBODY)
    assert_one_error(ended, "Could not connect to the endpoint URL")
    assert server.run(*job).returncode == 0


def test_the_reasons_are_those_of_images_on_a_disk(
    server: Server, bucket: str, expected: dict[str, Row], micro_bundle: Path, tmp_path: Path
) -> None:
    images = [f"s3://{bucket}/images/{name}" for name in BROKEN]
    ended = server.run(micro_bundle, *images, "--output", tmp_path / "job")
    assert ended.returncode == 1, ended.stderr
    found = by_name(rows_in(Folder(str(tmp_path / "job"))), f"s3://{bucket}/images/")
    assert {name: row["error"] for name, row in found.items()} == {
        name: expected[name]["error"] for name in BROKEN
    }


def test_a_signal_ends_a_job_whose_storage_does_not_answer(
    server: Server, micro_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("s3://bucket/a.png\ns3://bucket/b.png\n")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(100)
        silent.settimeout(ENDED)
        process = server.start(
            micro_bundle, f"@{tmp_path}/list.txt", "--output", tmp_path / "job",
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}",
        )  # fmt: skip
        with ending(process):
            silent.accept()[0].close()  # one that breaks off; the others wait
            time.sleep(1)
            process.terminate()
            try:
                output, errors = process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                pytest.fail("the command did not end within 30 s of SIGTERM")
    assert (process.returncode, output) == (143, ""), errors
    assert "interrupted: 0 of 2 images are done; the same command continues" in errors
    assert "Traceback" not in errors
