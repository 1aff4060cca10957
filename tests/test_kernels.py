# SPDX-License-Identifier: Apache-2.0
"""The kernels: what they compute, by Triton's interpreter, and that they compile for the GPUs that there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rankfall as rf
from rankfall import _chain, _elbo

triton = pytest.importorskip("triton", reason="the kernels need Triton")


def test_kernels_do_what_torch_does():
    script = Path(__file__).with_name("interpreted_kernels.py")
    run = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1", "RANKFALL_COMPILE": "0"},  # No code for a CPU, as on a GPU.
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("fine") == 9


@pytest.mark.parametrize(("numbers", "architecture"), [("fp32", 75), ("bf16", 80), ("fp64", 90)])
@pytest.mark.parametrize("kernel", ["product_kernel", "gradient_kernel"])
def test_kernels_compile_without_a_gpu(kernel, numbers, architecture, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415  Triton may be missing.
    from triton.compiler import ASTSource  # noqa: PLC0415

    from rankfall import _kernels  # noqa: PLC0415

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(_kernels, kernel)
    sums = "fp64" if numbers == "fp64" else "fp32"
    pointers = {"left": numbers, "matrices": numbers, "grad": numbers, "out": numbers}
    pointers |= {"which": "i64"}
    if kernel == "gradient_kernel":
        pointers["out"] = sums
    constants = {"UNROLLED": 4, "BLOCK_ROWS": 16, "BLOCK_COLUMNS": 32}
    constants["SUM"] = getattr(_kernels.tl, f"float{sums[2:]}")
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in function.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    assert len(compiled.asm["cubin"])


@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize("kernel", ["draw_kernel", "scale_kernel", "gradients_kernel"])
def test_kernels_of_draws_compile_without_a_gpu(kernel, architecture, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415  Triton may be missing.
    from triton.compiler import ASTSource  # noqa: PLC0415

    from rankfall import _draw_kernels  # noqa: PLC0415

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(_draw_kernels, kernel)
    kinds = {"seed": "*i64", "chunks": "*i32", "chunk_of": "*i32", "entries": "i32", "most": "i32", "scale": "fp32"}
    constants = {"CHUNK": 1024, "MANY": 128, "LEAST": 1e-10}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: kinds.get(name, "*fp32") for name in function.arg_names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    assert len(compiled.asm["cubin"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose GPU does not work")
def test_a_gpu_on_which_kernels_do_not_run_is_served_by_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    with pytest.warns(
        RuntimeWarning, match=r"kernels do not run on cuda \(.+\), so rows of tables are read by torch.bmm"
    ):
        assert not _chain._has_kernels.__wrapped__(torch.device("cuda"))
    with pytest.warns(RuntimeWarning, match=r"kernels do not run on cuda \(.+\), so factors are drawn by torch"):
        assert not _elbo._has_kernels.__wrapped__(torch.device("cuda"))
    assert not _chain._has_kernels(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tables_on_a_gpu_are_those_of_a_cpu():
    torch.manual_seed(0)
    layer = rf.nn.Embedding(100_000, 128, format=rf.TTM(16, out_modes=(40, 50, 50), in_modes=(4, 4, 8))).eval()
    twin = rf.nn.Embedding(100_000, 128, format=layer.weight.format).eval()
    twin.load_state_dict(layer.state_dict())
    ids, grad = torch.randint(100_000, (4096,)), torch.randn(4096, 128)
    twin.cuda()
    found, wanted = twin(ids.cuda()), layer(ids)
    found.backward(grad.cuda())
    wanted.backward(grad)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(twin.parameters(), layer.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-3, atol=1e-4)
