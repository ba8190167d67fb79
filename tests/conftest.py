"""What all tests share: no network, steady hypothesis settings, tests skipped where their GPU or package is missing."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from importlib.util import find_spec

import pytest
from hypothesis import settings

from groupwise.texts import encodable

# Before transformers or datasets are imported: a test that reaches for the Hub must fail, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is: models of tests gain nothing from a second thread, which makes them many times slower on a busy
# machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job that a shell starts in the background ignores Ctrl-C, and so does whatever it starts; tests are about those that
# do not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine makes single examples slow; the suite's own timeout is the bound.
settings.register_profile("groupwise", deadline=None, derandomize=True)
settings.load_profile("groupwise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--extras", action="store_true", help="refuse to skip tests whose package is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What hostile texts print goes from process to process, where tests are shared out: as UTF-8."""
    report = yield
    report.sections = [(name, encodable(text)) for name, text in report.sections]
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _skip_without_gpu(items)
    for item in items:
        packages = [mark.kwargs["package"] for mark in item.iter_markers("extras")]
        for package in (name for name in packages if find_spec(name) is None):
            item.add_marker(pytest.mark.skip(reason=f"needs {package}: make test-extras"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only those that were chosen: `-m` may leave out what cannot be installed here."""
    if not session.config.getoption("extras"):
        return
    packages = {mark.kwargs["package"] for item in session.items for mark in item.iter_markers("extras")}
    missing = sorted(name for name in packages if find_spec(name) is None)
    if missing:
        raise pytest.UsageError(f"--extras: not installed here: {', '.join(missing)}")


def _skip_without_gpu(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of a test's is kept in the user's own folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield
