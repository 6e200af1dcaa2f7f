"""Make .venv from requirements.lock, or say in one line what is missing. Standard library only; parses on Python 3.6.

    python3 cluster/setup_env.py          (`make` calls it; PYTHON=python3.12 make demo takes another interpreter)

A second call is instant: .venv keeps the hash of the lock it was made from. An interrupted one goes on where it was.
pip's own variables work, such as PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for a torch without CUDA.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time

NEEDS_PYTHON = (3, 11)
NEEDS_BYTES = 10**10  # .venv is 3 GB, 8 GB with the CUDA packages that PyPI's torch brings; pip unpacks beside it
STAMP = "lock.sha256"


class Missing(Exception):
    """What the machine lacks, in one line."""


def main(root):
    """Make root/.venv; return the exit status."""
    venv = os.path.join(root, ".venv")
    lock = os.path.join(root, "requirements.lock")
    try:
        wanted = lock_hash(lock)
        if stamp(venv) == wanted:
            return 0
        check_python(sys.version_info)
        check_disk(root, venv)
        make_venv(venv)
        install(venv, lock)
        with open(os.path.join(venv, STAMP), "w") as file:
            file.write(wanted)
    except Missing as error:
        print(str(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def check_python(version):
    """Raise Missing where `version` is too old."""
    if tuple(version[:2]) < NEEDS_PYTHON:
        raise Missing(
            "Python {}.{} is too old: AnimeSketch needs 3.11 or newer. Name one: make demo PYTHON=python3.11".format(
                version[0], version[1]
            )
        )


def check_disk(root, venv):
    """Raise Missing where .venv is still to be made and the disk can't hold it."""
    free = shutil.disk_usage(root).free
    if not os.path.exists(os.path.join(venv, STAMP)) and free < NEEDS_BYTES:
        raise Missing(
            "The disk of {} has {:.1f} GB free: AnimeSketch needs {:.0f} GB for its .venv.".format(
                root, free / 1e9, NEEDS_BYTES / 1e9
            )
        )


def lock_hash(lock):
    """Return the sha256 of the lock file's bytes."""
    try:
        with open(lock, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        raise Missing(
            "{} is missing: this is not a whole checkout. Get it back: git checkout -- requirements.lock".format(lock)
        )


def stamp(venv):
    """Return the hash of the lock that .venv was made from, None where it is not complete."""
    try:
        with open(os.path.join(venv, STAMP)) as file:
            recorded = file.read()
    except OSError:
        return None
    return recorded if os.path.exists(python_of(venv)) else None  # False for a link whose Python is gone


def python_of(venv):
    return os.path.join(venv, "bin", "python")


def make_venv(venv):
    """Make .venv unless it has a pip that runs; one broken off in the middle is made anew."""
    if works([python_of(venv), "-m", "pip", "--version"]):
        return
    say("Making {} with Python {}.{} ...".format(venv, *sys.version_info[:2]))
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", venv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if made.returncode:
        raise Missing(
            "{} can't make a virtual environment (python3-venv is missing): apt-get install python3-venv".format(
                sys.executable
            )
        )


def works(command):
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def install(venv, lock):
    """pip install the lock into .venv; one line of progress every few seconds, pip's errors as they are."""
    with open(lock) as file:
        total = sum(1 for line in file if line[:1].isalnum())
    say("Installing {} packages into {} (some minutes, 3 GB; 8 GB where torch brings CUDA) ...".format(total, venv))
    command = [python_of(venv), "-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check"]
    # deepspeed comes as source alone: without this an older pip builds it in a way that it says is deprecated
    pip = subprocess.Popen(command + ["--use-pep517", "-r", lock], stdout=subprocess.PIPE, universal_newlines=True)
    begun = said = time.time()
    found = 0
    try:
        for line in pip.stdout or ():
            found += line.startswith(("Collecting ", "Requirement already satisfied: "))
            writing = line.startswith("Installing collected packages")
            if writing or time.time() - said > 10:
                said = time.time()
                doing = "writing them" if writing else "{} of {} fetched".format(min(found, total), total)
                say("  {:4.0f} s  {}".format(said - begun, doing))
    finally:
        status = pip.wait()
        if pip.stdout:
            pip.stdout.close()
    if status:
        raise Missing(
            "pip could not install requirements.lock (status {}, its error is above). Run again.".format(status)
        )
    say("Installed in {:.0f} s.".format(time.time() - begun))


def say(line):
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
