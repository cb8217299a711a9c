"""Gets what tests need of Debian: `install_debian.py rtsp|cpp|chromium REPORT`.

On Debian and its relatives the missing packages are installed if this runs as root. REPORT gets
one line: `ready`, or why the tests that need them must be skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SERVER = Path(__file__).with_name("rtsp_server.py")


@dataclass(frozen=True)
class Need:
    """What tests need.

    Attributes:
        name: in words.
        packages: of Debian that bring it.
        check: a command that succeeds when it is there.
    """

    name: str
    packages: tuple[str, ...]
    check: tuple[str, ...]


NEEDS = {
    "rtsp": Need(
        name="RTSP server",
        packages=(
            "python3-gi", "gir1.2-gst-rtsp-server-1.0", "gstreamer1.0-plugins-base",
            "gstreamer1.0-plugins-good", "gstreamer1.0-plugins-bad", "gstreamer1.0-plugins-ugly",
        ),
        check=("/usr/bin/python3", str(SERVER), "--check"),  # for which the packages are built
    ),
    "cpp": Need(
        name="libraries of the C++ example",
        packages=("cmake", "g++", "nlohmann-json3-dev", "libopencv-imgcodecs-dev"),
        check=(
            "ls", "/usr/bin/cmake", "/usr/include/nlohmann/json.hpp",
            "/usr/include/opencv4/opencv2/imgcodecs.hpp",
        ),
    ),
    "chromium": Need(
        name="browser",
        packages=("chromium", "chromium-driver"),
        check=("chromedriver", "--version"),
    ),
}  # fmt: skip
SECONDS = 900  # that an installation may take


def what_is_missing(need: Need) -> str:
    """Why it cannot be used, and nothing where it can."""
    try:
        done = subprocess.run(need.check, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{need.check[0]} does not run: {error}"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]


def install(need: Need) -> str:
    """Installs the packages; says what went wrong, and nothing where all went well."""
    if sys.platform != "linux" or shutil.which("apt-get") is None:
        return "no apt-get here to install it"
    if os.geteuid() != 0:
        return f"only root can install it: apt-get install {' '.join(need.packages)}"
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *need.packages]
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


def outcome(need: Need) -> str:
    missing = what_is_missing(need)
    if missing:
        problem = install(need)
        missing = problem and f"{missing}; {problem}"
        missing = missing or what_is_missing(need)
    return f"no {need.name}: {missing}" if missing else "ready"


if __name__ == "__main__":
    need, report = NEEDS[sys.argv[1]], Path(sys.argv[2])
    told = outcome(need)
    report.write_text(told + "\n")
    print(f"{need.name}: {told}")
