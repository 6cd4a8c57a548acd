"""Whether Triton kernels can run here; queries on a GPU are fake tensors, which no machine needs a GPU for."""
import sys
import sysconfig
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ops import RegionGrid, Routing, choose_impl, routed_attention, support

COMPILERS = {"gcc": "/usr/bin/gcc", "clang": "/usr/bin/clang"}


@pytest.fixture
def headers(monkeypatch, tmp_path):
    """A folder that this Python says its headers lie in, and no other; gcc is there."""
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(support.shutil, "which", {"gcc": COMPILERS["gcc"]}.get)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    return tmp_path


@pytest.mark.parametrize("name", COMPILERS)
def test_gcc_and_clang_serve(name, headers, monkeypatch):
    monkeypatch.setattr(support.shutil, "which", {name: COMPILERS[name]}.get)
    assert support._launcher_lacks() is None


def test_no_compiler(headers, monkeypatch):
    monkeypatch.setattr(support.shutil, "which", lambda name: None)
    assert support._launcher_lacks() == (
        "Triton compiles its launcher with a C compiler, and none was found: install gcc or set CC"
    )


def test_a_compiler_named_by_cc(headers, monkeypatch):
    """Triton takes CC, and looks no further where it names nothing that can be run."""
    monkeypatch.setenv("CC", "/opt/bin/icx")
    assert support._launcher_lacks() == (
        "Triton compiles its launcher with the C compiler that CC names, and '/opt/bin/icx' was not found"
    )
    monkeypatch.setattr(support.shutil, "which", {"/opt/bin/icx": "/opt/bin/icx"}.get)
    assert support._launcher_lacks() is None


def test_no_python_h(headers):
    (headers / "Python.h").unlink()
    version = ".".join(map(str, sys.version_info[:2]))
    assert support._launcher_lacks() == (
        f"Triton compiles its launcher, and Python.h is missing in {headers}: install python{version}-dev"
    )


@pytest.mark.parametrize("name", ["CPATH", "C_INCLUDE_PATH"])
def test_headers_that_the_compiler_is_told_of(name, headers, monkeypatch):
    (headers / "Python.h").unlink()
    elsewhere = headers / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "Python.h").touch()
    monkeypatch.setenv(name, f"/nowhere:{elsewhere}")
    assert support._launcher_lacks() is None


def test_debians_scheme_for_local_packages_has_no_headers(headers, monkeypatch):
    folders = {"posix_local": "/nowhere", "posix_prefix": str(headers)}
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": folders[scheme]})
    assert support._launcher_lacks() is None


@pytest.mark.parametrize("version,old", [
    ("3.2.0", True), ("3.2.0+git1234abc", True), ("2.10", True), ("3.3.0", False), ("3.5.0.post1", False),
    ("3.6rc1", False), ("3.6.0+git1234abc", False), ("3.10", False), ("4", False), ("of my own", False),
])  # fmt: skip
def test_versions(version, old, headers):
    assert support.is_too_old(version) == old
    reason = f"its kernels need Triton 3.3 or newer, {version} is installed"
    assert support._gpu_lacks(version, hip=None) == (reason if old else None)


def test_rocm_is_refused(headers):
    """There device.type is cuda too, and the package has another name."""
    for version in (None, "3.6.0"):
        assert "on ROCm" in support._gpu_lacks(version, hip="6.4.43482")
    assert support._gpu_lacks(None, hip=None) == "the package triton is not installed"


@pytest.fixture
def call_on_gpu(monkeypatch):
    """Arguments of routed attention on a GPU of compute capability 9.0, and nothing that was warned of."""
    monkeypatch.setattr(support, "_known_major", lambda device: 9)
    monkeypatch.setattr(support, "_warned", set())
    monkeypatch.setattr(support, "_GPU_LACKS", None)
    grid = RegionGrid.fit(14, 14)
    with FakeTensorMode():
        query = torch.empty(1, 14, 14, 2, 32, device="cuda")
        return query, Routing(torch.empty(1, 49, 16, dtype=torch.int64, device="cuda"), grid, grid)


def test_auto_takes_triton_where_it_can_run(call_on_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_impl(*call_on_gpu) == "triton"


@pytest.mark.parametrize("lacking", ["the package triton is not installed", "there is no compiler"])
def test_auto_says_once_that_it_falls_back(lacking, call_on_gpu, monkeypatch):
    monkeypatch.setattr(support, "_GPU_LACKS", lacking)
    with pytest.warns(UserWarning) as warned:
        assert [choose_impl(*call_on_gpu) for _ in range(3)] == ["masked"] * 3
    assert len(warned) == 1 and f"many times slower: {lacking}" in str(warned[0].message)
    query, routing = call_on_gpu
    with pytest.raises(ValueError, match=f"impl='triton' cannot run: {lacking}"):
        routed_attention(query, query, query, routing, impl="triton")


def test_auto_is_silent_where_nothing_can_be_installed(call_on_gpu, monkeypatch):
    """What the kernels cannot compute, and what is fastest without them."""
    query, routing = call_on_gpu
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(support, "_known_major", lambda device: 7)
        assert choose_impl(query, routing) == "masked"
        monkeypatch.setattr(support, "_GPU_LACKS", "there is no compiler")
        assert choose_impl(query.double(), routing) == "masked"
        assert choose_impl(query.repeat(1, 1, 1, 1, 5), routing) == "masked"
        assert choose_impl(torch.empty(1, 14, 14, 2, 32), routing) == "masked"
        assert choose_impl(query, routing._replace(routes=routing.routes.repeat(1, 1, 4)[..., :49])) == "masked"


@pytest.mark.compile
def test_the_warning_breaks_no_graph(call_on_gpu, monkeypatch):
    monkeypatch.setattr(support, "_GPU_LACKS", "there is no compiler")

    def attend(x):
        support.warn_of_fallback("there is no compiler")
        return x + 1

    with pytest.warns(UserWarning, match="there is no compiler"):
        assert torch.compile(attend, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
