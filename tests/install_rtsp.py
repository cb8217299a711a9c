"""Gets GStreamer's RTSP server for the system's Python: `install_rtsp.py REPORT`.

On Debian and its relatives the missing packages are installed if this runs as root. REPORT gets
one line: `ready`, or why the tests that need the server must be skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PYTHON = Path("/usr/bin/python3")  # for which the packages are built
SERVER = Path(__file__).with_name("rtsp_server.py")
PACKAGES = (
    "python3-gi", "gir1.2-gst-rtsp-server-1.0", "gstreamer1.0-plugins-base",
    "gstreamer1.0-plugins-good", "gstreamer1.0-plugins-bad", "gstreamer1.0-plugins-ugly",
)  # fmt: skip
SECONDS = 900  # that an installation may take


def what_is_missing() -> str:
    """Why the server cannot run, and nothing where it can."""
    if not PYTHON.exists():
        return f"there is no {PYTHON}"
    try:
        done = subprocess.run(
            [PYTHON, SERVER, "--check"], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{PYTHON} does not run it: {error}"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]


def install() -> str:
    """Installs the packages; says what went wrong, and nothing where all went well."""
    if sys.platform != "linux" or shutil.which("apt-get") is None:
        return "no apt-get here to install it"
    if os.geteuid() != 0:
        return f"only root can install it: apt-get install {' '.join(PACKAGES)}"
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    said = ""
    for update in (False, True):  # lists of packages may be missing, or old
        try:
            if update:
                apt("apt-get", "update")
            done = apt(*command)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"apt-get cannot install it: {error}"
        if done.returncode == 0:
            return ""
        said = done.stderr.strip()
    return f"apt-get cannot install it: {' '.join(said.split())[-200:]}"


def apt(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs apt-get, which asks nothing."""
    return subprocess.run(
        command, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=SECONDS,
    )  # fmt: skip


def outcome() -> str:
    missing = what_is_missing()
    if missing and PYTHON.exists():
        problem = install()
        missing = problem and f"{missing}; {problem}"
        missing = missing or what_is_missing()
    return f"no RTSP server: {missing}" if missing else "ready"


if __name__ == "__main__":
    report, told = Path(sys.argv[1]), outcome()
    report.write_text(told + "\n")
    print(f"RTSP: {told}")
