"""Makes an environment with Triton's server in it, beside this one: `install_tritonserver.py REPORT`.

The server comes in NVIDIA's package for Python programs, with the Python backend alone; its client and
a comask without PyTorch go beside it. It is an environment of its own, since that server's Python backend
takes NumPy 1 alone. REPORT gets one line: the folder, or why the tests that need it must be skipped.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SERVER = "nvidia-pytriton==0.7.0"  # Triton 2.51
LINKED = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so"
# in one environment they have to agree; ONNX Runtime is this one's, so that results can be equal
BESIDE = (
    "tritonclient[http]",
    "numpy<2",
    f"onnxruntime=={importlib.metadata.version('onnxruntime')}",
)


def install(folder: Path) -> str:
    """Makes the environment; says where it is, or what is in the way."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"no Triton server: its package is for Linux on x86-64, not {platform.platform()}"
    libraries = Path(str(sysconfig.get_config_var("LIBDIR")))
    if not any(libraries.glob(f"**/{LINKED}*")):
        return f"no Triton server: its Python backend needs {LINKED}, and {libraries} has none"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    for packages in (["--no-deps", SERVER], [*BESIDE, "--editable", ROOT]):
        done = subprocess.run([*pip, *packages], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            shutil.rmtree(folder)
            return f"no Triton server: pip cannot install it: {done.stderr.strip()[-200:]}"
    (server,) = folder.glob("lib/python3*/site-packages/pytriton/tritonserver")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        return f"no Triton server: its package has no Python backend for Python {version}"
    shutil.copy(stub, server / "backends" / "python")
    return str(folder)


if __name__ == "__main__":
    report = Path(sys.argv[1])
    outcome = install(report.with_suffix(".venv").resolve())
    report.write_text(outcome + "\n")
    print(f"Triton: {outcome}")
