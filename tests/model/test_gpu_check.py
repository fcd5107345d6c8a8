"""`make gpu-check` runs to its end: every part, rehearsed on the CPU with small shapes, and the report around them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_parts, gpu_service
from model import kernels
from model.config import ModelConfig
from model.encoding import backend

ROOT = Path(__file__).parents[2]
needs_kernel = pytest.mark.skipif(backend() == "twin", reason="no compiled kernel (make kernels)")


def failed(report):
    return {name: wrong for name, wrong in report.checks.items() if wrong is not None}


@needs_kernel
def test_correctness_passes_on_the_cpu():
    report = gpu_parts.Report()
    gpu_parts.correctness("cpu", report, [(3, 40, 1, 7, 16), (2, 130, 13, 15, 33)])
    assert len(report.checks) > 60
    assert not failed(report)
    assert {row["dtype"] for row in report.rows} == {"float32", "float16", "bfloat16"}


@pytest.mark.parametrize("part", [gpu_parts.correctness, gpu_parts.memory, gpu_parts.sanitized])
def test_the_twin_does_not_pass_for_the_kernel(part, monkeypatch):
    monkeypatch.setenv("ENCNET_KERNELS", "off")
    monkeypatch.setattr(kernels, "library", kernels.library.__wrapped__)
    report = gpu_parts.Report()
    part("cpu", report)
    wrong = "AssertionError: the twin computes encode on cpu, not the cpu kernel: nothing was checked"
    assert report.checks == {"the kernel is what runs": wrong}


@needs_kernel
def test_the_twin_does_not_pass_where_the_kernel_takes_no_tensor_of_this_device(monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda *given: False)
    report = gpu_parts.Report()
    gpu_parts.sanitized("cpu", report)
    assert list(failed(report)) == ["the kernel is what runs"]


@needs_kernel
def test_what_the_sanitizer_watches_passes_on_the_cpu():
    report = gpu_parts.Report()
    gpu_parts.sanitized("cpu", report)
    assert not failed(report) and len(report.checks) == 1 + 3 * 4 * 2


@needs_kernel
def test_correctness_finds_a_wrong_result(monkeypatch):
    def slightly_wrong(inputs, reference_positions=0.0):
        encoded, *gradients = gpu_parts.twin_results(inputs, reference_positions)
        return encoded * 1.0001, *gradients

    monkeypatch.setattr(gpu_parts, "results", slightly_wrong)
    report = gpu_parts.Report()
    gpu_parts.correctness("cpu", report, [(2, 130, 13, 15, 33)])
    assert (
        "encoded: error" in failed(report)["equals the float64 twin: float32 contiguous B,D,H,W,K=(2, 130, 13, 15, 33)"]
    )


def test_the_operator_passes_on_the_cpu():
    report = gpu_parts.Report()
    gpu_parts.operator("cpu", report)
    assert not failed(report)
    assert len(report.checks) >= 10


def test_speed_measures_every_contender_and_judges_it(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    report = gpu_parts.Report()
    gpu_parts.speed("cpu", report, batch=1, positions=(30,), channels=16, rounds=1, copies=1)
    rows = [row for row in report.rows if row["what"] == "speed"]
    assert len(rows) == 13  # two types, two layouts, three passes; and the general path
    for row in rows:
        assert not [key for key in row if key.endswith("_failed")]
        assert row["ours_ms"] > 0
        if row["pass"] != "backward":
            wanted = {"twin", "compiled", "broadcast"} if row["layout"] == "contiguous" else {"twin"}
            assert {f"{name}_over_ours_ms" for name in wanted} <= row.keys()
    row = dict(
        rows[0], what="speed", dtype="bfloat16", positions=8100, share_percent=49.9, ours_gpu_ms=1.0, twin_gpu_ms=0.9
    )
    judged = gpu_parts.Report()
    gpu_parts.judge(row | {"pass": "backward"}, judged)
    gpu_parts.judge(row | {"pass": "forward", "share_percent": 60.0}, judged)
    assert [wrong for name, wrong in judged.checks.items() if "copy's rate" in name] == ["49.9 %", None]
    assert [wrong for name, wrong in judged.checks.items() if "the twin" in name] == ["0.90x", "0.90x"]


def test_what_cannot_be_measured_is_told(monkeypatch):
    def broken(*given):
        raise RuntimeError("CUDA failed: invalid argument")

    monkeypatch.setattr(gpu_parts, "encode", broken)
    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    report = gpu_parts.Report()
    gpu_parts.speed("cpu", report, batch=1, positions=(30,), channels=16, rounds=1, copies=1)
    assert failed(report)["ours runs: forward, bfloat16 contiguous B=1 N=30"] == "CUDA failed: invalid argument"
    assert "the compiled, forward, bfloat16 contiguous B=1 N=30: CUDA failed: invalid argument" in report.not_run
    row = {"ours_failed": "no graph", "ours_ms": 1.0}
    gpu_parts.add_share(row, 10, 10)
    assert "share_percent" not in row, "a call's own time is not the GPU's"


def test_what_a_sanitizer_finds_first_is_kept(monkeypatch):
    words = "\n".join(["========= Invalid read", *(f"line {i}" for i in range(50)), "========= 1 error"])
    kept = gpu_check.excerpt(words).splitlines()
    assert kept[:2] == ["========= Invalid read", "========= 1 error"]
    assert kept[-1] == "line 49" and len(kept) == 2 + 14

    def child(name, device, seconds, before):
        shares.append(seconds)
        assert before[:2] == ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"), "else memcheck misses what leaves a tensor"
        printed = f"of {before[before.index('--tool') + 1]}"
        if "memcheck" in before:
            checks = {"sanitized ends well": "exit status 9", "equals the twin": "error"}
            return {**gpu_check.empty(), "checks": checks, "exit_status": 9, "printed": printed}
        checks, not_run = {"equals the twin": "error"}, ["sanitized: cut after 2 s"]
        return {"checks": checks, "rows": [], "not_run": not_run, "exit_status": None, "printed": printed}

    shares = []
    monkeypatch.setattr(gpu_check, "child", child)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: name)
    part = gpu_check.sanitizer("cpu", 20)
    tools = gpu_check.SANITIZER_TOOLS
    assert tools == ("memcheck", "racecheck")
    assert shares == [pytest.approx(10, abs=1), pytest.approx(20, abs=1)], "what memcheck leaves is racecheck's"
    assert all(part["checks"][f"{tool}: equals the twin"] == "error" for tool in tools), "also of one that was ended"
    assert part["checks"]["memcheck: sanitized ends well"] == "exit status 9"
    assert part["not_run"] == ["racecheck: sanitized: cut after 2 s"]
    assert all(f"--- {tool}\nof {tool}" in part["printed"] for tool in tools)


REFUSAL = '========= Error: Device not supported. Please refer to the "Supported Devices" section'
INVALID = "========= COMPUTE-SANITIZER\n========= Invalid __shared__ read of size 4 bytes"


@pytest.mark.parametrize(
    ("status", "printed", "wrong"),
    [
        (0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors", None),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", None),
        (0, "========= COMPUTE-SANITIZER", "no summary, exit status 0"),
        (9, f"{INVALID}\nthis type is not supported", "========= Invalid __shared__ read of size 4 bytes"),
        (9, f"{INVALID}\n{REFUSAL}", "========= Invalid __shared__ read of size 4 bytes"),
        (0, f"{REFUSAL}\n========= ERROR SUMMARY: 12 errors", REFUSAL),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
         "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"),
        (None, INVALID, "========= Invalid __shared__ read of size 4 bytes"),
    ],
)  # fmt: skip
def test_a_sanitizer_tool_is_believed_by_its_own_lines(status, printed, wrong):
    found = {**gpu_check.empty(), "checks": {"watched": None}, "exit_status": status, "printed": printed}
    part = gpu_check.judge("memcheck", found)
    assert part["checks"] == {"memcheck finds no error": wrong, "memcheck: watched": None}
    part = gpu_check.judge("memcheck", found | {"exit_status": None, "printed": "========= COMPUTE-SANITIZER"})
    assert part["checks"] == {"memcheck: watched": None}, "cut short, it has not said that there is no error"


def test_only_a_tool_that_says_so_does_not_work_here():
    facts = {"checks": {"sanitized ends well": "exit status 1"}, "exit_status": 1}
    part = gpu_check.judge("memcheck", {**gpu_check.empty(), **facts, "printed": f"not supported\n{REFUSAL}"})
    assert not part["checks"] and part["not_run"] == [f"compute-sanitizer memcheck does not work here: {REFUSAL}"]
    part = gpu_check.judge("memcheck", {**gpu_check.empty(), **facts, "printed": "RuntimeError: not supported"})
    assert part["checks"]["memcheck: sanitized ends well"] == "exit status 1" and not part["not_run"]


def test_overhead_and_onnx_runtime_run_on_the_cpu():
    report = gpu_parts.Report()
    gpu_parts.overhead("cpu", report, rounds=10)
    gpu_parts.onnx_runtime("cpu", report)
    assert not report.not_run
    assert all(row["microseconds"] > 0 for row in report.rows)
    wrong = failed(report)
    assert not wrong or all("not registered" in words for words in wrong.values())  # no compiled kernel here


def test_the_services_targets_are_measured_on_the_cpu_too():
    report = gpu_parts.Report()
    config = ModelConfig(num_classes=5, backbone="resnet18", output_stride=16, channels=32, codewords=4)
    gpu_service.service("cpu", report, config, side=96, shapes=2, clients=(1,))
    assert not failed(report)
    assert not report.not_run
    measured = {row["what"]: row for row in report.rows}
    assert measured["equal labels"]["share"] >= gpu_service.LEAST_EQUAL
    assert measured["authors' windows, eager"]["ratio"] > 0
    assert measured["server"]["statuses"].keys() == {"200"}


def test_without_the_servers_packages_its_check_is_not_run(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "service.server", raising=False)
    report = gpu_parts.Report()
    gpu_service.server(tmp_path / "absent.onnx", "cpu", report, (1,))
    assert not report.checks
    assert [reason.partition(":")[0] for reason in report.not_run] == ["the server"]


@needs_kernel
def test_a_part_that_dies_loses_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "SECONDS", {"no such part": 60, "memory": 60})
    file = tmp_path / "results" / "gpu.json"
    assert gpu_check.check("cpu", "a GPU", file, []) == 1
    parts = json.loads(file.read_text())["parts"]
    assert parts["memory"]["not_run"] == ["peak memory: no GPU"]
    assert "KeyError" in parts["no such part"]["checks"]["no such part ends well"]
    printed = capsys.readouterr().out
    assert "FAILED no such part ends well" in printed and "not run: peak memory" in printed


@pytest.mark.parametrize(("total", "seconds"), [(10, 10), (100, 60)])
def test_a_part_that_is_cut_short_has_not_failed(tmp_path, monkeypatch, total, seconds):
    def command(words, seconds):
        if "--output" in words:
            under_way = {"checks": {"first": None}, "rows": [], "not_run": [], "under_way": "second"}
            Path(words[-1]).write_text(json.dumps(under_way))
        return status, "Aborted"

    monkeypatch.setattr(gpu_check, "SECONDS", {"memory": 60})
    monkeypatch.setattr(gpu_check, "TOTAL_SECONDS", total)
    monkeypatch.setattr(gpu_check, "run_command", command)
    file = tmp_path / "gpu.json"
    status = None
    assert gpu_check.check("cpu", "a GPU", file, []) == 0
    part = json.loads(file.read_text())["parts"]["memory"]
    assert part["not_run"] == [f"memory: cut after {seconds} s, during: second"] and part["checks"] == {"first": None}
    status = -6
    assert gpu_check.check("cpu", "a GPU", file, []) == 1
    part = json.loads(file.read_text())["parts"]["memory"]
    assert part["checks"] == {"first": None, "memory ends well": "exit status -6, during: second: Aborted"}


def test_the_first_failure_of_a_part_is_named(tmp_path, monkeypatch, capsys):
    wrong = {"passes": None, "an illegal address": "error 700", "after it": "error 700"}
    monkeypatch.setattr(gpu_check, "SECONDS", {"memory": 60, "overhead": 60})
    parts = iter([{**gpu_check.empty(), "checks": wrong}, {**gpu_check.empty(), "checks": {"passes": None}}])
    monkeypatch.setattr(gpu_check, "child", lambda *given: next(parts))
    file = tmp_path / "gpu.json"
    assert gpu_check.check("cpu", "a GPU", file, []) == 1
    written = json.loads(file.read_text())["parts"]
    assert [part["first_failure"] for part in written.values()] == ["an illegal address", None]
    printed = capsys.readouterr().out.splitlines()
    assert "memory: 1 of 3 checks passed; first failure: an illegal address" in printed
    assert "overhead: 1 of 1 checks passed" in printed


def test_a_second_piece_keeps_the_parts_of_the_first(tmp_path, monkeypatch, capsys):
    def child(name, device, seconds):
        return {**gpu_check.empty(), "checks": {f"a check of {name}": wrong}, "rows": [{"what": "x", "in": name}]}

    def parts():
        return {name: part["first_failure"] for name, part in json.loads(file.read_text())["parts"].items()}

    monkeypatch.setattr(gpu_check, "SECONDS", {"memory": 60, "overhead": 60, "speed": 60})
    monkeypatch.setattr(gpu_check, "child", child)
    file = tmp_path / "gpu.json"
    wrong = "error"
    assert gpu_check.check("cpu", "a GPU", file, ["speed"]) == 1
    wrong = None
    assert gpu_check.check("cpu", "a GPU", file, ["memory"]) == 0, "of what was run now"
    assert list(parts().items()) == [("memory", None), ("speed", "a check of speed")]
    printed = capsys.readouterr().out
    assert "what x, in speed" in printed.rpartition("memory: 1 of 1 checks passed")[2] and "begun anew" not in printed
    assert gpu_check.check("cpu", "a GPU", file, ["speed"]) == 0
    assert parts() == {"memory": None, "speed": None}

    assert gpu_check.check("cpu", "another GPU", file, ["overhead"]) == 0
    assert parts() == {"overhead": None}
    assert f"{file}: begun anew, as what it holds is of another gpu" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "code_digest", lambda: "edited")
    assert gpu_check.check("cpu", "another GPU", file, ["memory"]) == 0
    assert parts() == {"memory": None}
    assert f"{file}: begun anew, as what it holds is of another code" in capsys.readouterr().out
    file.write_text("[]")
    assert gpu_check.check("cpu", "a GPU", file, ["memory"]) == 0
    assert f"{file}: begun anew, as it holds no results" in capsys.readouterr().out
    assert gpu_check.check("cpu", "a GPU", file, []) == 0
    assert parts().keys() == {"memory", "overhead", "speed"}


def test_a_build_that_is_cut_short_has_not_failed(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_check, "run_command", lambda words, seconds: (None, ""))
    assert gpu_check.build(200) == gpu_check.empty(not_run=["build: cut after 200 s"])


def test_a_kill_leaves_the_results_of_the_last_run(tmp_path, monkeypatch):
    def killed(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "SECONDS", {"memory": 60})
    monkeypatch.setattr(gpu_check, "run_command", lambda command, seconds: (0, ""))
    file = tmp_path / "gpu.json"
    file.write_text("{}")
    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.check("cpu", "a GPU", file, [])
    assert file.read_text() == "{}"


def test_a_part_that_hangs_is_ended():
    status, printed = gpu_check.run_command([sys.executable, "-uc", "print(1); import time; time.sleep(60)"], 2)
    assert status is None
    assert printed.strip() == "1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "no NVIDIA GPU is visible to PyTorch here; run this on a machine with one\n"
