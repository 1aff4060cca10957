# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import textwrap

OF_THE_TRAIN_EXTRA = ("accelerate", "rich", "tyro", "sklearn", "PIL", "torchmetrics")


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
