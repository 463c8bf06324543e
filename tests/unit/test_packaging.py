"""What is shipped: the wheel, the systemd units, the list of packages."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "packaging" / "systemd").glob("*.service"))


def run(*args: str | Path, **kwargs: object) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "WALBD_"))}
    done = subprocess.run(
        [str(arg) for arg in args], env=env, capture_output=True, text=True, check=False, timeout=1800, **kwargs
    )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    text: str = done.stdout
    return text


def test_every_package_on_disk_is_listed_and_mapped() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {"walbd"}
    for top in ("walbd", "storage", "proxy", "archive", "protocol", "ext"):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            on_disk.add(".".join(parts if parts[0] == "walbd" else ("walbd", *parts)))
    assert sorted(tools["packages"]) == sorted(on_disk)
    for name in on_disk:
        parts = tuple(name.split("."))
        if len(parts) > 1 and parts[1] in ("storage", "proxy", "archive", "protocol", "ext"):
            assert tools["package-dir"][name] == "/".join(parts[1:])


def test_links_lead_to_the_top_level_folders() -> None:
    for name in ("storage", "proxy", "archive", "protocol", "ext"):
        link = ROOT / "walbd" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def test_sdist_to_wheel_to_clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nexec gcc "$@" -O0\n')  # how fast the core is does not matter here
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    tree = tmp_path / "tree"
    git = ("git", "-c", "safe.directory=*")  # whoever owns the checkout
    files = run(*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for file in filter(None, files):
        source = ROOT / file
        if source.is_symlink() or source.is_file():
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, tree / file, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, "--sdist", "-o", tmp_path, tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    run("tar", "-xf", sdist, "-C", tmp_path)
    run(*build, "--wheel", "-o", tmp_path, tmp_path / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = tmp_path.glob("*.whl")

    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"walbd"}
    compiled = {Path(name).name.split(".")[0] for name in names if name.endswith(".so")}
    assert compiled == {path.stem for path in (ROOT / "ext").glob("*.pyx")}
    assert not [name for name in names if name.endswith((".pyx", ".pxd", ".c", ".h"))]
    assert "walbd/py.typed" in names
    assert {f"walbd/ext/{path.name}" for path in (ROOT / "ext").glob("*.pyi")} <= set(names)

    # Dependencies come from the environment of the tests: only walbd itself is installed anew.
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv)
    site = next((venv / "lib").glob("python*")) / "site-packages"
    here = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (site / "zz-dependencies.pth").write_text(f"{here}\n")
    run(venv / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    bin_dir, scratch = venv / "bin", tmp_path / "scratch"
    scratch.mkdir()
    where = run(bin_dir / "python", "-P", "-c", "import walbd; print(walbd.__file__)", cwd=scratch)
    assert Path(where.strip()).is_relative_to(venv)
    assert run(bin_dir / "walbd", "--version", cwd=scratch).strip().endswith("0.1.0")
    wlog = ROOT / "tests" / "golden" / "mix512.wlog"
    run(bin_dir / "walbd", "wlog", "to-wdiff", wlog, "-o", "a.wdiff", cwd=scratch)
    for name in ("by-log", "by-diff"):
        (scratch / name).write_bytes(bytes(1 << 20))
    run(bin_dir / "walbd", "wlog", "redo", wlog, "by-log", cwd=scratch)
    run(bin_dir / "walbd", "wdiff", "apply", "a.wdiff", "by-diff", cwd=scratch)
    assert (scratch / "by-log").read_bytes() == (scratch / "by-diff").read_bytes()
    assert any((scratch / "by-log").read_bytes())


def test_build_without_the_core_fails(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "ext").mkdir()
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "no ext/*.pyx found" in done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_units_verify(unit: Path, tmp_path: Path) -> None:
    # The units name /usr/bin/walbd; verify wants an executable there, so it gets one that surely exists.
    name = unit.name.replace("@", "@x") if "@" in unit.name else unit.name
    copy = tmp_path / name
    copy.write_text(unit.read_text().replace("/usr/bin/walbd", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert tmp_path.name not in done.stderr, done.stderr
    assert "Type=notify" in unit.read_text()
