"""A local Ray cluster with token authentication, on loopback and free ports, that ends with the block that opened it.

    with LocalCluster(log=Path("head.log")) as cluster:
        cluster.submit(["python", "-m", "factory", "status", "--root", "/data"], log=Path("job.log"))

A user would type the same: `ray start --head --block`, `ray job submit`. Another Ray on the machine is not touched.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.keeper import Kept

REPOSITORY = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 180  # about 15 s on two idle cores
LAST_LINES = 25  # of a log, shown when its command fails

# What is asked on loopback, and the token with it, never goes to the proxy that the environment names.
loopback = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# Lines that tell a reader nothing about the job: of Ray's command line, and what libraries say when they start.
_NOISE = re.compile(
    r"^\s*$|(cli|sdk|dashboard_sdk|working_dir|packaging|job_manager|usage_lib)\.py:\d+ -- |Running entrypoint for job"
    r"|worker\.py:\d+ -- |Progress bars disabled|^\(TrainController|Reporting training result|core_worker\.cc"
    r"|Setting up process group|^WARNING: Location|requires torchvision|real_accelerator\.py|Writing model shards"
    r"|Loading (weights|pipeline components)|(Future|Deprecation|User)Warning|^\s*warnings\.warn"
    r"|^(\([^)]*\) )? +return func\("
)
_STAMP = re.compile(
    r"^\([\w:]+ pid=\d+(?:, ip=[\d.]+)?\) |^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\s+(?:INFO|WARNING) \S+\.py:\d+ -- "
)
_JOB_ENDED = re.compile(r"ERR cli\.py:\d+ -- ")  # below it `ray job submit` repeats the job's last lines
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_WRONG = re.compile(r"error|exception|traceback|fail|refus|missing|not found|killed|out of memory", re.IGNORECASE)


class CommandFailed(RuntimeError):
    """A command ended with a status other than 0. The message holds the log's lines that matter and its path."""


def run(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    show: Callable[[str], None] | None = None,
) -> None:
    """Run `command` in the repository to its end; its whole output goes to `log`.

    `show` gets each line that is not noise, when it comes (default: printed, indented). Raises CommandFailed when the
    status is not 0. Leaving early, by Ctrl-C too, ends the command and all that it started.
    """
    show = show or show_indented
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file, Kept(command, env=env, cwd=REPOSITORY) as child:
        assert child.output is not None
        ended = False
        for raw in child.output:
            file.write(raw)
            file.flush()
            for line in _ANSI.sub("", raw.decode(errors="replace")).rstrip("\n").split("\r"):
                ended = ended or bool(_JOB_ENDED.search(line))
                if not ended and not _NOISE.search(line):
                    show(_STAMP.sub("", line).rstrip())
        status = child.wait()
    if status:
        status = _job_status(log) or status
        raise CommandFailed(f"{_name(command)} ended with status {status}.\n{what_matters(log)}\nWhole log: {log}")


def show_indented(line: str) -> None:
    """Print one line of a running command, indented and cut to the terminal's width."""
    width = shutil.get_terminal_size((120, 24)).columns
    print(f"    {line}"[: max(width - 1, 40)], flush=True)


def what_matters(log: Path) -> str:
    """Return the last lines of a log; where the last sign of trouble is further up, the lines around it too."""
    with open(log, errors="replace") as file:
        lines = [_ANSI.sub("", line).rstrip() for line in deque(file, maxlen=2000)]
    ended = next((i for i, line in enumerate(lines) if _JOB_ENDED.search(line)), None)
    if ended is not None and any("Job entrypoint command failed" in line for line in lines[ended:]):
        lines = lines[:ended]
    lines = [line for line in lines if not _NOISE.search(line)]
    wrong = [i for i, line in enumerate(lines) if _WRONG.search(line)]
    last = lines[-LAST_LINES:]
    if wrong and wrong[-1] < len(lines) - LAST_LINES:
        last = [*lines[max(wrong[-1] - 10, 0) : wrong[-1] + 5], "[…]", *lines[-5:]]
    return "\n".join(f"    {line}" for line in last) or "    (it printed nothing)"


def free_ports(count: int) -> list[int]:
    """Return `count` different ports that were free on loopback a moment ago; OSError when there are none.

    They lie below the range from which the system hands out ports by itself, or Ray's own processes might take them.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 12_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(errno.EADDRINUSE, "no free port from 20000 to 31999")


class LocalCluster:
    """A Ray head with `num_cpus` logical CPUs, as a child process. Use it as a context manager.

    Attributes, once started: `address` (host:port for `ray.init` and `serve`), `dashboard` (URL for `ray job`), `env`
    (the environment for clients: both addresses, and where the token lies), `token`.
    """

    def __init__(self, *, num_cpus: int = 4, log: Path, env: Mapping[str, str] | None = None):
        """`log` gets the head's own output; Ray's session logs are put beside it when the block fails.

        More logical CPUs than cores, so that stages which hold one each never wait for each other for ever.
        """
        self.num_cpus = num_cpus
        self.log = log
        self._extra_env = dict(env or {})

    def __enter__(self) -> LocalCluster:
        self._stack = contextlib.ExitStack()
        try:
            for attempt in range(3):  # a free port may be taken between the look and the bind
                try:
                    self._start()
                    return self
                except CommandFailed as error:
                    if attempt == 2 or "in use" not in str(error):
                        raise
                    self._stack.close()
            raise AssertionError("not reached")
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def _start(self) -> None:
        # A short path of its own: Ray's sockets lie below it, and a socket's path holds at most 107 bytes.
        base = "/tmp" if os.path.isdir("/tmp") else None
        self._folder = Path(tempfile.mkdtemp(prefix="as-", dir=base))  # mode 0700
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self.token = secrets.token_hex(32)
        token_file = self._folder / "token"
        with open(os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self.token)
        gcs, dashboard, client, http, grpc, runtime, metrics, nodes, objects = free_ports(9)
        self.address, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        common = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **self._extra_env,
            **dict.fromkeys(("no_proxy", "NO_PROXY"), _no_proxy(os.environ)),
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "RAY_API_SERVER_ADDRESS": self.dashboard,  # Ray Train looks for "the" cluster, and finds any on the machine
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or Ray replaces 127.0.0.1 by the machine's outer address
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.env = {**common, "RAY_ADDRESS": self.address}
        head_env = {
            **common,
            "AUTOSCALER_METRIC_PORT": "0",  # fixed ports by default: a second head would want the same
            "DASHBOARD_METRIC_PORT": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing to drain, no 30 s at the end
        }
        options = {
            "node-ip-address": "127.0.0.1",
            "port": gcs,
            "node-manager-port": nodes,
            "object-manager-port": objects,
            "ray-client-server-port": client,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": http,
            "dashboard-agent-grpc-port": grpc,
            "runtime-env-agent-port": runtime,
            "metrics-export-port": metrics,
            "num-cpus": self.num_cpus,
            "temp-dir": self._folder / "r",  # below the closed folder: Ray opens its own to everybody
            "log-style": "record",
        }
        command = [tool("ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in options.items()]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as file:
            self._head = self._stack.enter_context(Kept(command, env=head_env, output=file, removes=self._folder))
        self.pid = self._head.pid
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            status = self._head.poll()
            if status is not None:
                raise CommandFailed(f"ray start ended with status {status}.\n{what_matters(self.log)}")
            if time.monotonic() > deadline:
                raise CommandFailed(f"No Ray head after {START_TIMEOUT_S} s.\n{what_matters(self.log)}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        """Return whether the Jobs API answers and the node has registered: a job can be submitted."""
        try:
            self.get("/api/jobs/")
            nodes = self.get("/nodes?view=summary")["data"]["summary"]
        except (urllib.error.URLError, OSError, ValueError, KeyError):
            return False
        return any(node.get("raylet", {}).get("state") == "ALIVE" for node in nodes)

    def get(self, path: str) -> Any:
        """Return the JSON that the dashboard answers at `path`, asked with the token."""
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {self.token}"})
        with loopback.open(request, timeout=10) as reply:
            return json.load(reply)

    def submit(self, entrypoint: Sequence[str], *, log: Path, show: Callable[[str], None] | None = None) -> None:
        """Run `entrypoint` as a Ray job with the repository as its working folder; stream it; wait for its end.

        Raises CommandFailed when the job fails. Leaving early does not stop the job: the end of the cluster does.
        """
        job = [tool("ray"), "job", "submit", "--working-dir", str(REPOSITORY), "--address", self.dashboard]
        run([*job, "--", *entrypoint], log=log, env=self.env, show=show)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and kind is not KeyboardInterrupt:
            with contextlib.suppress(OSError, AttributeError):
                logs = (self._folder / "r/session_latest" / "logs").resolve()
                shutil.copytree(
                    logs, self.log.with_suffix(".session"), dirs_exist_ok=True, ignore_dangling_symlinks=True
                )
        self._stack.close()


def tool(name: str) -> str:
    """Return the path of a command installed beside this Python."""
    return os.path.join(os.path.dirname(sys.executable), name)


def _no_proxy(environ: Mapping[str, str]) -> str:
    """Return the hosts that are reached without a proxy: those that `environ` names, and loopback."""
    named = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    return named if named == "*" else ",".join(filter(None, [named, "127.0.0.1,localhost"]))


def _name(command: Sequence[str]) -> str:
    """Return a command as a reader knows it: no paths before program names, nothing of `ray job submit` itself."""
    words = list(command)
    if "--" in words:
        words = words[words.index("--") + 1 :]
    return " ".join([os.path.basename(words[0]), *words[1:4]])[:80]


def _job_status(log: Path) -> int | None:
    """Return the status that a Ray job's own command ended with, told by `ray job submit`, which itself ends with 1."""
    found = re.findall(r"Job entrypoint command failed with exit code (\d+)", log.read_text(errors="replace"))
    return int(found[-1]) if found else None
