# SPDX-License-Identifier: Apache-2.0
import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import rankfall as rf

OF_THE_TRAIN_EXTRA = ("accelerate", "rich", "tyro", "sklearn", "PIL", "torchmetrics", "tokenizers", "matplotlib")


def in_a_new_process(script):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_needs_only_the_core_and_changes_nothing():
    output = in_a_new_process(f"""
        import logging, random, sys, warnings
        import torch, opt_einsum, safetensors.torch, jaxtyping

        def settings():
            return (
                torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
                torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                torch.get_float32_matmul_precision(), torch.get_rng_state().tolist(), random.getstate(),
                logging.root.handlers, logging.root.level, warnings.filters,
            )

        before = str(settings())
        import rankfall
        assert str(settings()) == before
        extra = [name for name in {OF_THE_TRAIN_EXTRA} if name in sys.modules]
        assert not extra, extra
    """)
    assert output == ""


def test_the_core_works_without_the_train_extra():
    output = in_a_new_process(f"""
        import sys
        for name in {OF_THE_TRAIN_EXTRA}:
            sys.modules[name] = None
        import torch, rankfall as rf
        model = rf.tensorize_(torch.nn.Sequential(torch.nn.Linear(12, 20)), rf.TTM(3))
        rf.ELBOLoss(model, 10)(model(torch.ones(2, 12)).mean()).backward()
        rf.prune_(model, threshold=0.1)
        rf.export(model)
        str(rf.summary(model))
        try:
            rf.fit(model, [], None, optimizer=None, epochs=1, num_data=1)
        except ImportError as error:
            assert "rf.fit needs accelerate: pip install 'rankfall[train]'" in str(error), error
        else:
            raise AssertionError("no ImportError")
    """)
    assert output == ""


def test_every_public_name_is_an_attribute_and_the_version_is_that_of_the_package():
    output = in_a_new_process("""
        import importlib.metadata
        import rankfall as rf
        assert rf.__version__ == importlib.metadata.version("rankfall")
        for name in ("CP Tucker TT TTM TR LogUniform HalfCauchy Point MeanField LowRankTensor nn tensorize_ kl ELBOLoss"
                     " prune_ ranks summary export save load fit").split():
            getattr(rf, name)
    """)
    assert output == ""


def _public_functions():
    """Functions and classes of all modules whose own name has no underscore, with the public methods of the classes."""
    for info in pkgutil.walk_packages(rf.__path__, "rankfall."):
        if info.name == "rankfall._kernels" and find_spec("triton") is None:
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != info.name:
                continue
            if inspect.isfunction(value):
                yield f"{info.name}.{name}", value
            elif inspect.isclass(value):
                yield f"{info.name}.{name}", value
                for method, member in vars(value).items():
                    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                    if not method.startswith("_") and inspect.isfunction(function):
                        yield f"{info.name}.{name}.{method}", function


def test_everything_public_is_documented_and_annotated():
    """The linter skips private modules, and all of ours are private."""
    found = dict(_public_functions())
    assert len(found) > 80
    assert [name for name, value in found.items() if not value.__doc__] == []
    bare = []
    for name, value in found.items():
        if inspect.isfunction(value):
            needed = {*inspect.signature(value).parameters, "return"} - {"self", "cls"}
            bare += [(name, parameter) for parameter in needed - value.__annotations__.keys()]
    assert bare == []
