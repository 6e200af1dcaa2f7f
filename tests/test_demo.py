"""The demo's parts: setting up, the local cluster and its end, failing steps, the report."""

import ast
import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import demo, local, pictures, report
from cluster.journal import Journal, fingerprint
from cluster.keeper import Kept
from cluster.local import CommandFailed, LocalCluster, free_ports, run, what_matters
from factory.store import Committer, Store

REPOSITORY = Path(__file__).resolve().parent.parent
SETUP = REPOSITORY / "cluster/setup_env.py"
Disk = namedtuple("Disk", "total used free")


# Setting up


@pytest.fixture
def setup_env() -> Any:
    return namedtuple("Module", "main globals")(*(lambda g: (g["main"], g))(runpy.run_path(str(SETUP))))


def test_setup_parses_on_old_pythons() -> None:
    ast.parse(SETUP.read_text(), feature_version=(3, 6))


def test_an_old_python_is_told_in_one_line(setup_env: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "requirements.lock").write_text("a==1\n")
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    assert setup_env.main(str(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Python 3.9 is too old: AnimeSketch needs 3.11 or newer.")


def test_a_small_disk_is_told_in_one_line(setup_env: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "requirements.lock").write_text("a==1\n")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(10**11, 10**11 - 10**9, 10**9))
    assert setup_env.main(str(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"has 1\.0 GB free: AnimeSketch needs 10 GB", line)
    assert not (tmp_path / ".venv").exists()


def test_setup_installs_once_and_again_when_the_lock_changes(setup_env: Any, tmp_path: Path, monkeypatch: Any) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# nothing to install\n")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(10**12, 0, 10**12))
    asked = []
    popen = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda command, **more: asked.append(command) or popen(command, **more))
    assert setup_env.main(str(tmp_path)) == 0
    (installed,) = [command for command in asked if "install" in command]
    assert installed[-3:] == ["--use-pep517", "-r", str(lock)]  # or an older pip speaks of a deprecated way
    asked.clear()
    assert setup_env.main(str(tmp_path)) == 0
    assert asked == []  # nothing was even looked at
    lock.write_text("# another\n")
    assert setup_env.main(str(tmp_path)) == 0
    assert sum("install" in command for command in asked) == 1


def test_make_names_every_target() -> None:
    told = subprocess.run(["make", "-s", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert {"demo", "test", "bench", "soak", "lint", "lock"} <= set(re.findall(r"make (\w+)", told))


# Commands


def test_a_kept_command_takes_its_orphans_with_it(tmp_path: Path) -> None:
    # a daemon as Ray starts them: its parent is gone, it has a session of its own, and it ignores SIGTERM
    script = """
import os, signal, subprocess, sys, time
daemon = subprocess.Popen(
    [sys.executable, "-uc", "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(600)"],
    start_new_session=True, stdout=subprocess.PIPE,
)
daemon.stdout.readline()
print(daemon.pid, flush=True)
if sys.argv[1] == "stay": time.sleep(600)
"""
    for stay in ("stay", "go"):
        with Kept([sys.executable, "-c", script, stay]) as child:
            assert child.output is not None
            daemon = psutil.Process(int(child.output.readline()))
            if stay == "go":
                assert child.wait(30) == 0
        assert not running(daemon)


def test_a_failed_command_raises_its_last_lines_and_the_path_of_its_log(tmp_path: Path) -> None:
    script = "import sys; print('half done'); print('Table x has no column y. Run: z', file=sys.stderr); sys.exit(3)"
    shown: list[str] = []
    with pytest.raises(CommandFailed) as caught:
        run([sys.executable, "-u", "-c", script], log=tmp_path / "logs/a.log", show=shown.append)
    told = str(caught.value)
    assert "ended with status 3" in told
    assert "Table x has no column y. Run: z" in told
    assert str(tmp_path / "logs/a.log") in told
    assert shown == ["half done", "Table x has no column y. Run: z"]


def test_the_cause_is_shown_although_noise_follows_it(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("\n".join(["start", "ValueError: no such codec", *(f"closing {i}" for i in range(100))]))
    assert "ValueError: no such codec" in what_matters(log)


def test_a_program_that_is_not_there_is_a_failed_command(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="Could not start /no/such/program"):
        run(["/no/such/program"], log=tmp_path / "a.log")


@pytest.mark.parametrize("ended_by", ["the caller", "itself"])
def test_the_folder_of_a_kept_command_goes_where_the_caller_ends_it(ended_by: str, tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "token").touch()
    script = "import sys, time; print('up', flush=True); time.sleep(600 if sys.argv[1] == 'the caller' else 0)"
    child = Kept([sys.executable, "-c", script, ended_by], removes=folder)
    assert child.output is not None
    assert child.output.readline() == b"up\n"
    if ended_by == "itself":
        assert child.wait(30) == 0
    child.end()
    assert folder.exists() == (ended_by == "itself")


# The cluster


@pytest.fixture
def closed_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that sends all HTTP to a proxy that nobody runs."""
    (port,) = free_ports(1)
    for name in ("no_proxy", "http_proxy", "https_proxy", "all_proxy"):
        for spelt in (name, name.upper()):
            if name == "no_proxy":
                monkeypatch.delenv(spelt, raising=False)
            else:
                monkeypatch.setenv(spelt, f"http://127.0.0.1:{port}")


class Answers(BaseHTTPRequestHandler):
    """Answers every request with its path and Authorization, and with one picture."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        told = {
            "path": self.path,
            "authorization": self.headers["Authorization"],
            "data": [{"b64_json": "", "seed": 5}],
        }
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stub_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_is_asked_on_loopback_goes_past_the_proxy(stub_server: str, closed_proxy: None, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="refused"):  # Python by itself takes the proxy
        urllib.request.urlopen(stub_server)
    cluster = LocalCluster(log=tmp_path / "head.log")
    cluster.dashboard, cluster.token = stub_server, "secret"
    told = cluster.get("/api/jobs/")
    assert (told["path"], told["authorization"]) == ("/api/jobs/", "Bearer secret")
    assert demo._healthy(stub_server)
    asked = pictures.Request(shows="a", route="generations", group="f", prompt="a", reference=None, seed=5)
    assert list(pictures.ask(stub_server, tmp_path, [asked], tmp_path / "images")) == [asked]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": ".intra"}, ".intra,127.0.0.1,localhost"),
        ({"no_proxy": "a.b", "NO_PROXY": ".intra"}, "a.b,127.0.0.1,localhost"),  # as Python reads the two
        ({"no_proxy": "*"}, "*"),  # means all only where it stands alone
    ],
)
def test_loopback_is_added_to_what_needs_no_proxy(environ: dict[str, str], expected: str) -> None:
    assert local._no_proxy(environ) == expected


def running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def listening(processes: set[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {each.laddr.ip for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    return found


def test_a_local_cluster_wants_its_token_stays_on_loopback_runs_jobs_and_ends(
    closed_proxy: None, tmp_path: Path
) -> None:
    with LocalCluster(log=tmp_path / "head.log") as cluster:
        for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                local.loopback.open(urllib.request.Request(f"{cluster.dashboard}/api/jobs/", headers=headers))
            assert refused.value.code in (401, 403)
        assert cluster.get("/api/jobs/") == []
        token_file = Path(cluster.env["RAY_AUTH_TOKEN_PATH"])
        assert token_file.stat().st_mode & 0o777 == 0o600
        assert token_file.parent.stat().st_mode & 0o777 == 0o700  # Ray's sockets lie below it

        shown: list[str] = []
        code = "import os, factory; print('in', os.path.isfile('pyproject.toml'), factory.__name__)"
        cluster.submit(["python", "-c", code], log=tmp_path / "job.log", show=shown.append)
        assert shown == ["in True factory"]

        with pytest.raises(CommandFailed, match=r"(?s)ended with status 3\..*no column y.*job2\.log"):
            cluster.submit(
                ["python", "-c", "print('no column y'); raise SystemExit(3)"], log=tmp_path / "job2.log", show=len
            )

        # a job that would go on for ever, with a daemon of its own
        code = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
        job = [local.tool("ray"), "job", "submit", "--no-wait", "--address", cluster.dashboard]
        run([*job, "--", "python", "-c", code], log=tmp_path / "job3.log", env=cluster.env, show=len)
        keeper = psutil.Process(cluster.pid)
        wait_for(lambda: any(p.name() == "sleep" for p in keeper.children(recursive=True)))
        started = {keeper, *keeper.children(recursive=True)}
        assert len(started) > 5
        assert all(ip.endswith("127.0.0.1") or ip == "::1" for ip in listening(started))
    assert not [process for process in started if running(process)]
    assert not token_file.parent.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_cluster_ends_with_the_process_that_opened_it(number: int, tmp_path: Path) -> None:
    script = f"""
import pathlib, time
from cluster.local import LocalCluster
with LocalCluster(log=pathlib.Path({str(tmp_path / "head.log")!r})) as cluster:
    print(cluster.pid, cluster.env["RAY_AUTH_TOKEN_PATH"], flush=True)
    time.sleep(600)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert child.stdout is not None
        pid, token = child.stdout.readline().split()
        keeper = psutil.Process(int(pid))
        started = {keeper, *keeper.children(recursive=True)}
        assert len(started) > 5
        child.send_signal(number)
        child.wait(60)
        wait_for(lambda: not any(running(process) for process in started), 60)
        assert not Path(os.fsdecode(token)).parent.exists()  # after SIGKILL its keeper removes it
    finally:
        child.kill()
        child.wait()


def wait_for(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


# The demo


def test_a_failed_step_stops_the_demo_with_its_log_and_status_1(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def fail(folder: Path, *, log: Path) -> None:
        run([sys.executable, "-c", "print('No codec can write this.'); raise SystemExit(5)"], log=log)

    monkeypatch.setattr(demo.footage, "draw_clips", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert demo.main(["--output", str(tmp_path / "demo")]) == 1
    told = capsys.readouterr().err
    assert "ended with status 5" in told
    assert "No codec can write this." in told
    assert str(tmp_path / "demo/logs/footage.log") in told
    assert not (tmp_path / "demo/dataset").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "/data/x"), "The demo stopped: No space left on device: /data/x"),
        (FileNotFoundError("No table /x. Run: y"), "The demo stopped: No table /x. Run: y"),
    ],
)
def test_an_error_of_the_system_is_told_in_one_line(
    error: OSError, told: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def fail(folder: Path, *, log: Path) -> None:
        raise error

    monkeypatch.setattr(demo.footage, "draw_clips", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert demo.main(["--output", str(tmp_path / "demo")]) == 1
    assert capsys.readouterr().err.strip() == told


class Steps:
    """The demo's steps without what they do: each leaves the files that tell that it was done."""

    def __init__(self, output: Path, monkeypatch: pytest.MonkeyPatch):
        self._output = output
        self.done: list[str] = []
        self.code: dict[str, str] = {}  # in place of the code's bytes
        monkeypatch.setattr(demo.footage, "draw_clips", self.draw_clips)
        monkeypatch.setattr(demo.footage, "fetch_bunny", lambda folder, log: (folder / demo.footage.BUNNY).touch())
        monkeypatch.setattr(demo, "LocalCluster", lambda log: contextlib.nullcontext(self))
        monkeypatch.setattr(demo, "server", lambda *_: contextlib.nullcontext("http://x"))
        monkeypatch.setattr(demo, "write_report", lambda output, journal: output / "report.html")
        monkeypatch.setattr(pictures, "requests_for", lambda root: [])
        monkeypatch.setattr(pictures, "ask", lambda *_: self.fill("images/index.json") or [])
        monkeypatch.setattr(demo, "fingerprint", lambda *given, code: repr((given, [self.code.get(c) for c in code])))

    def draw_clips(self, folder: Path, *, log: Path) -> None:
        names = [f"toon-{i:02}{end}" for i in range(demo.footage.CLIPS) for end in (".mp4", ".truth.json")]
        self.fill(*(f"footage/{name}" for name in names))

    def submit(self, entrypoint: list[str], *, log: Path) -> None:
        self.fill("dataset/samples.lance/x" if "factory" in entrypoint else "run/adapter/SHA256SUMS")

    def fill(self, *names: str) -> None:
        for name in names:
            (self._output / name).parent.mkdir(parents=True, exist_ok=True)
            (self._output / name).touch()
        self.done.append(names[0].split("/")[0])


def test_what_comes_of_changed_footage_or_code_is_made_anew(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    steps = Steps(tmp_path, monkeypatch)
    demo.demo(tmp_path)
    everything = ["footage", "dataset", "run", "images"]
    assert steps.done == everything
    for changed, redone in (
        ("", []),
        ("serving", ["images"]),
        ("trainer", ["run", "images"]),
        ("factory", ["dataset", "run", "images"]),
        ("factory/toon", ["footage", "dataset", "run", "images"]),
    ):
        steps.done.clear()
        steps.code[changed] = "changed"
        for folder in everything:
            (tmp_path / folder / "old").touch()
        capsys.readouterr()
        demo.demo(tmp_path)
        assert steps.done == redone, changed
        assert capsys.readouterr().out.count("code or inputs have changed: made anew") == len(redone)
        kept = {path.parent.name for path in tmp_path.glob("*/old")}
        assert kept == set(everything) - set(redone), changed


def test_ctrl_c_ends_the_demo_with_status_130(tmp_path: Path) -> None:
    script = """
import sys, cluster.demo as demo
from cluster.local import run
step = [sys.executable, "-uc", "import os, time; print(os.getpid()); time.sleep(600)"]
demo.footage.draw_clips = lambda folder, log: run(step, log=log)
sys.exit(demo.main(["--output", sys.argv[1]]))
"""
    child = subprocess.Popen(
        [sys.executable, "-uc", script, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    step = psutil.Process(next(int(line) for line in child.stdout if line.strip().isdigit()))
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors.strip().startswith("Stopped; everything that was started has been ended.")
    assert not running(step)


@pytest.mark.parametrize(
    ("free", "why"), [(10**9, "has 1.0 GB free; the demo needs 3 GB."), (10**12, "Another demo is running")]
)
def test_what_the_demo_can_not_use_is_told_in_one_line(free: int, why: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: Disk(10**13, 0, free))
    with contextlib.ExitStack() as stack:
        if free == 10**12:
            stack.enter_context(demo.one_at_a_time(tmp_path))
        with pytest.raises(CommandFailed) as caught, demo.one_at_a_time(tmp_path):
            pass
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_step_is_done_once_and_again_when_its_inputs_change(tmp_path: Path) -> None:
    done = []
    result = tmp_path / "result"

    def once(key: str) -> None:
        with Journal(tmp_path / "demo.json").step("a", "A step") as step:
            if step.needed(key, result.exists(), anew=result):
                step.command(["python", "-m", "a b"])
                done.append(key)
                result.mkdir(exist_ok=True)
                (result / key).touch()

    for key in ("1", "1", "2"):
        once(key)
    assert done == ["1", "2"]
    assert [path.name for path in result.iterdir()] == ["2"]  # made anew
    written = json.loads((tmp_path / "demo.json").read_text())["steps"]["a"]
    assert written["commands"] == ["python -m 'a b'"]

    def fail() -> None:
        with Journal(tmp_path / "demo.json").step("a", "A step") as step:
            assert step.needed("3", True)
            raise CommandFailed("no")

    with pytest.raises(CommandFailed):
        fail()
    once("3")  # a failed step does not count as done
    assert done == ["1", "2", "3"]


def test_fingerprints_see_code_and_inputs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("cluster.journal.REPOSITORY", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text("1")
    first = fingerprint(["in"], code=["a"])
    assert first == fingerprint(["in"], code=["a"])
    assert first != fingerprint(["other"], code=["a"])
    (tmp_path / "a/x.py").write_text("2")
    assert first != fingerprint(["in"], code=["a"])


# The report


@pytest.fixture
def finished_demo(small_dataset: Path, tmp_path: Path) -> Path:
    """A demo's folder: the small dataset, and made-up metrics and pictures."""
    from PIL import Image

    from cluster.pictures import requests_for

    (tmp_path / "dataset").symlink_to(small_dataset)
    for folder in ("run", "images"):
        (tmp_path / folder).mkdir()
    rows: list[dict[str, Any]] = [
        {"step": i, "loss": 1 / i, "lr": 1e-3, "samples_per_second": 8.0} for i in range(1, 41)
    ]
    rows.append({"step": 40, "validation_loss": 0.0625})
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = []
    for i, request in enumerate(requests_for(small_dataset)):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        index.append({"file": f"{i}.png", **vars(request), "prompt": request.prompt + "<script>alert(1)</script>"})
    (tmp_path / "images/index.json").write_text(json.dumps(index))
    return tmp_path


def test_the_report_is_one_file_that_tells_it_all(finished_demo: Path) -> None:
    steps = {"dataset": {"title": "Dataset", "key": "k", "seconds": 61.2, "commands": ["ray job submit -- x"]}}
    page = report.write_report(
        finished_demo, {"steps": steps, "versions": {"ray": "2.60.0"}, "machine": "2 cores"}
    ).read_text()
    told = report.funnel(finished_demo / "dataset")
    assert f"{told['kept']} of {told['candidates']} candidates kept" in page
    for source in ("toon-00.mp4", "toon-01.mp4"):
        assert f"<td>{source}</td>" in page
    for row in report.sample_rows(finished_demo / "dataset"):
        assert row["caption"] in page
        assert f"{row['source']} at {row['timestamp']:.2f} s" in page
    assert "adapter: keywords, sketch" in page
    assert "0.0625" in page
    assert "<svg" in page
    assert "1 min 01 s" in page
    assert "ray job submit -- x" in page
    # one file: every picture is inside, nothing is loaded, text is escaped
    kinds = {source.split(",")[0] for source in re.findall(r'<img[^>]* src="([^"]*)"', page)}
    assert kinds == {"data:image/jpeg;base64", "data:image/png;base64"}
    assert not re.search(r'(?:href|src)="(?!data:|#)', page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert len(page) < 6 * 10**6


def test_failed_sources_and_candidates_are_shown_with_their_errors(finished_demo: Path) -> None:
    root = finished_demo / "dataset"
    built = root.resolve()
    root.unlink()
    shutil.copytree(built, root)
    store = Store(str(root))
    before = report.funnel(root)
    cut = {"source_id": "cut", "uri": "/films/cut.mp4", "status": "partial", "error": "ends at <3> s"}
    text = {"source_id": "text", "uri": "/films/text.mp4", "status": "failed", "error": "not a video"}
    failed = {
        "frame_id": "cut-3000001",
        "source_id": "cut",
        "segment_id": "cut-0",
        "timestamp": 3.0,
        "status": "failed",
        "reason": "decode: bad_packet & more",
    }
    undecided = {**failed, "frame_id": "cut-1", "status": None, "reason": None}
    for table, rows in (("sources", [cut, text]), ("candidates", [failed, undecided])):
        Committer(store, table, every=1).add(store.write_unit(table, "made up", rows))

    told = report.funnel(root)
    assert told["sources"] == before["sources"] + 2
    assert told["failed_sources"] == 2
    assert told["candidates"] == before["candidates"] + 2
    assert told["kept"] == before["kept"]
    counts = {item["reason"]: item["count"] for item in told["reasons"]}
    assert counts["failed, decode: bad_packet & more"] == counts["undecided"] == 1
    assert sum(counts.values()) + told["kept"] == told["candidates"]
    page = report.write_report(finished_demo, {"steps": {}, "versions": {}, "machine": ""}).read_text()
    assert '<b class="failed">failed, decode: bad_packet &amp; more</b>' in page
    assert "<dt>sources failed, whole or in part</dt><dd>2</dd>" in page
    for line in ("partial: ends at &lt;3&gt; s", "failed: not a video"):
        assert f'<td class="wide failed">{line}</td>' in page


def test_rows_come_from_all_sources_before_any_comes_twice() -> None:
    taken = list(report.turns([["a0", "a1", "a2", "a3"], ["b0"]]))
    assert taken[0] == ["a2", "b0"]
    assert sorted(item for turn in taken for item in turn) == ["a0", "a1", "a2", "a3", "b0"]
