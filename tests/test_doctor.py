import sys
from pathlib import Path

import pytest

from pipelines import doctor

GIB = doctor.GIB


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_machine_that_runs_these_tests_has_what_the_demo_needs() -> None:
    findings = doctor.examine()
    assert [f for f in findings if not f.ok] == []
    assert len({f.name for f in findings}) == len(findings)


@pytest.mark.parametrize(("running", "ok"), [((3, 10, 9), False), ((3, 11, 0), True), ((3, 12, 4), True)])
def test_python_version(running: tuple[int, ...], ok: bool) -> None:
    finding = doctor.check_python(running)
    assert finding.ok == ok
    assert ("3.11 or 3.12" in finding.advice) != ok


def test_a_package_that_is_there_is_found_with_its_version() -> None:
    assert doctor.check_package("pytest", doctor.installed("pytest")) == doctor.Finding("pytest", pytest.__version__)


def test_a_package_that_is_absent_comes_with_the_extras_to_install() -> None:
    finding = doctor.check_package("vllm", doctor.installed("no-such-package"))
    assert not finding.ok
    assert "stepdistill[cpu]" in finding.advice
    assert "[gpu]" in finding.advice


def test_an_import_that_works() -> None:
    assert doctor.check_import("json", "import json", timeout=60) == doctor.Finding("json", "yes")


@pytest.mark.parametrize(
    ("statement", "found", "advice"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms", "uninstall torchvision"),
        ("raise ModuleNotFoundError('No module named vllm')", "No module named vllm", "stepdistill[cpu]"),
        ("raise OSError('libfoo.so: cannot open')", "libfoo.so", "python -c"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL", "python -c"),
        ("import os; os.kill(os.getpid(), 4)", "SIGILL", "instructions"),
        ("import sys; sys.exit(3)", "without a word", "python -c"),
    ],
)
def test_an_import_that_fails_or_crashes_is_a_finding(statement: str, found: str, advice: str) -> None:
    finding = doctor.check_import("it", statement, timeout=60)
    assert not finding.ok
    assert found in finding.found
    assert advice in finding.advice


def test_an_import_that_hangs_is_a_finding() -> None:
    finding = doctor.check_import("it", "while True: pass", timeout=0.2)
    assert not finding.ok
    assert "0.2 s" in finding.found


def test_no_compiler_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "my-c++ -m64")
    finding = doctor.check_compiler(doctor.compiler(), None)
    assert not finding.ok
    assert "no my-c++ on PATH" in finding.found
    assert "g++" in finding.advice


def test_python_headers(tmp_path: Path) -> None:
    assert not doctor.check_python_headers(tmp_path).ok
    (tmp_path / "Python.h").touch()
    assert doctor.check_python_headers(tmp_path).ok


def test_ninja_is_found_on_path_or_beside_python(tmp_path: Path) -> None:
    absent = doctor.check_ninja(None, tmp_path)
    assert not absent.ok
    assert "pip install ninja" in absent.advice
    assert doctor.check_ninja("/usr/bin/ninja", tmp_path) == doctor.Finding("ninja", "/usr/bin/ninja")
    (tmp_path / "ninja").touch()
    assert doctor.check_ninja(None, tmp_path) == doctor.Finding("ninja", str(tmp_path / "ninja"))


@pytest.mark.parametrize(
    ("cpuinfo", "found", "bf16"),
    [
        ("processor: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\nflags\t\t: fpu\n", "AVX-512, bf16", True),
        ("flags : fpu avx2\n", "AVX2, no bf16", False),
        ("Features : fp asimd bf16\n", "no AVX2, bf16", True),
        ("nothing of use", "no AVX2, no bf16", False),
    ],
)
def test_a_cpu_without_bf16_gets_fp32_as_advice(tmp_path: Path, cpuinfo: str, found: str, bf16: bool) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    finding = doctor.check_cpu(4, doctor.cpu_flags(tmp_path / "cpuinfo"))
    assert finding.ok
    assert finding.found == f"4 cores, {found}"
    assert ("student.precision=fp32" in finding.advice) != bf16


@pytest.mark.parametrize(("limit", "free"), [("max", 8 * GIB), (str(2 * GIB), 2 * GIB), (str(99 * GIB), 8 * GIB)])
def test_memory_is_what_the_machine_or_the_container_has_less_of(tmp_path: Path, limit: str, free: int) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {8 * 2**20} kB\n")
    (tmp_path / "limit").write_text(limit + "\n")
    assert doctor.available_memory(tmp_path / "meminfo", tmp_path / "limit") == free


def test_memory_of_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert doctor.check_memory(doctor.available_memory(tmp_path / "absent")).found == "unknown"


def test_little_memory_and_disk_come_with_advice_and_stop_nothing(tmp_path: Path) -> None:
    assert doctor.check_memory(4 * GIB).advice == doctor.check_disk(tmp_path, 5 * GIB).advice == ""
    memory, disk = doctor.check_memory(4 * GIB - 1), doctor.check_disk(tmp_path, 5 * GIB - 1)
    assert memory.ok
    assert disk.ok
    assert "teacher.kv_cache_gb" in memory.advice
    assert "storage" in disk.advice
    assert "5.0 GiB" in disk.found


def test_no_shared_memory(tmp_path: Path) -> None:
    finding = doctor.check_shared_memory(tmp_path / "shm")
    assert finding.ok
    assert "object store" in finding.advice


def test_no_gpu_is_fine() -> None:
    finding = doctor.check_gpus([], "2.13.0+cpu", doctor.gpus_of_torch("2.13.0+cpu"))
    assert finding.ok
    assert "teacher.gpus: 0" in finding.advice


def test_gpus_that_a_cpu_build_of_torch_cannot_use() -> None:
    finding = doctor.check_gpus(["NVIDIA L4, 23034 MiB"], "2.13.0+cpu", [])
    assert finding.ok
    assert finding.found == "NVIDIA L4, 23034 MiB"
    assert "stepdistill[gpu]" in finding.advice


def test_gpus_that_torch_sees() -> None:
    assert doctor.check_gpus(["x"], "2.13.0", ["A, 1 MiB", "B, 2 MiB"]) == doctor.Finding("GPUs", "A, 1 MiB, B, 2 MiB")


def test_model_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.model_cache() == Path.home() / ".cache/huggingface/hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert doctor.model_cache() == tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "mine"))
    assert doctor.model_cache() == tmp_path / "mine"


def test_a_model_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = doctor.check_model_cache(tmp_path / "file" / "hub", offline=False)
    assert finding.ok
    assert "set HF_HOME" in finding.advice


def test_a_model_cache_yet_to_be_made_and_offline(tmp_path: Path) -> None:
    assert doctor.check_model_cache(tmp_path / "a" / "b", offline=False).advice == ""
    assert "unset HF_HUB_OFFLINE" in doctor.check_model_cache(tmp_path, offline=True).advice


def test_ray_address_is_shown() -> None:
    assert doctor.check_ray_address("").advice == ""
    assert doctor.check_ray_address("10.0.0.1:6379").found == "10.0.0.1:6379"


def test_examining_imports_nothing_heavy() -> None:
    code = "import sys, pipelines.doctor; print({'ray', 'torch', 'vllm', 'transformers'} & set(sys.modules))"
    assert doctor._lines([sys.executable, "-c", code]) == ["set()"]
