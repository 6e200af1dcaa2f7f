"""The demo's parts: its commands, the local cluster and its end, failing steps."""

import contextlib
import json
import os
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

from cluster import demo, local, pictures
from cluster.journal import Journal, fingerprint
from cluster.keeper import Kept
from cluster.local import CommandFailed, LocalCluster, free_ports, run, what_matters

REPOSITORY = Path(__file__).resolve().parent.parent
Disk = namedtuple("Disk", "total used free")


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
