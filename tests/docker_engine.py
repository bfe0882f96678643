"""Find a Docker engine, or start one in a folder from Debian's packages, without installing anything.

    python tests/docker_engine.py FOLDER        # starts one and prints how to reach it, until Ctrl-C

The packages are unpacked, not installed; images, sockets and logs lie in the folder. Such an engine is meant
for machines that reach a Debian mirror and a Python index, but no registry of images: `stand_in` builds what
the Dockerfile and the compose file start from out of Debian's packages.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = (
    *("docker.io", "containerd", "runc", "tini", "iptables", "mmdebstrap"),
    *("libip4tc2", "libip6tc2", "libxtables12", "libnftnl11", "libmnl0", "libnfnetlink0"),
    "libnetfilter-conntrack3",
)
PLUGINS = ("docker-compose", "docker-buildx")  # Debian 12 has compose 1.29 only, so these are of Debian 13
TOOLS = ("apt-get", "dpkg", "perl")
MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
START_SECONDS = 60


class Unavailable(Exception):
    """There is no engine, and none can be started here."""


@dataclass(frozen=True)
class Engine:
    """An engine that answers. `folder` is None for one that was there already."""

    folder: Path | None
    environment: dict[str, str] = field(repr=False)

    def docker(self, *arguments: str, check: bool = True, **settings: object) -> str:
        """Run the docker command and return its stdout; raise AssertionError with its stderr."""
        done = subprocess.run(
            ["docker", *arguments],
            env=self.environment,
            stdin=settings.pop("stdin", subprocess.DEVNULL),  # type: ignore[call-overload]
            capture_output=True,
            text=True,
            check=False,
            **settings,
        )
        if check and done.returncode:
            told = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
            raise AssertionError(f"docker {' '.join(arguments[:6])} ended with {done.returncode}: {told}")
        return done.stdout


@contextmanager
def engine_in(folder: Path) -> Iterator[Engine]:
    """Yield the engine of this machine, or else one of our own. Raises Unavailable."""
    given = Engine(None, dict(os.environ))
    if shutil.which("docker") and _answers(given):
        given.docker("compose", "version")
        yield given
        return
    with own_engine(folder) as engine:
        yield engine


@contextmanager
def own_engine(folder: Path) -> Iterator[Engine]:
    """Start an engine whose files all lie in `folder`; stop it at the end. Raises Unavailable."""
    if why := find_obstacle():
        raise Unavailable(why)
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / "packages"
    if not (root / "usr/sbin/dockerd").exists():
        unpack(folder, root)
    environment = make_environment(folder, root)
    log = (folder / "dockerd.log").open("ab")
    daemon = subprocess.Popen(
        [
            "dockerd",
            *("--host", environment["DOCKER_HOST"], "--data-root", str(folder / "data")),
            *("--exec-root", str(folder / "exec"), "--pidfile", str(folder / "dockerd.pid")),
            *("--oom-score-adjust", "0", "--init-path", str(root / "usr/bin/tini-static")),
            # A network of our own: another engine on this machine may have the default one.
            *("--bip", "172.31.254.1/24", "--default-address-pool", "base=172.31.128.0/18,size=24"),
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    engine = Engine(folder, environment)
    try:
        until = time.monotonic() + START_SECONDS
        while not _answers(engine):
            if daemon.poll() is not None or time.monotonic() > until:
                last = (folder / "dockerd.log").read_text(errors="replace").splitlines()[-3:]
                raise Unavailable(f"dockerd does not run here: {' | '.join(last)}")
            time.sleep(0.5)
        yield engine
    finally:
        daemon.terminate()
        try:
            daemon.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(daemon.pid, signal.SIGKILL)
        log.close()


def find_obstacle() -> str | None:
    """Return why no engine can be started here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "no Docker engine answers, and one can only be started by root on Linux"
    if lacking := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"no Docker engine answers, and {', '.join(lacking)} to unpack one from Debian's packages lack"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "no Docker engine answers, and the kernel has no overlay file system for one"
    return None


def unpack(folder: Path, root: Path) -> None:
    """Fetch Debian's packages and unpack them into `root`. Raises Unavailable."""
    fetched = folder / "fetched"
    for release, names in (("bookworm", PACKAGES), ("trixie", PLUGINS)):
        home = folder / f"apt-{release}"
        for place in ("lists/partial", "cache/archives/partial"):
            (home / place).mkdir(parents=True, exist_ok=True)
        fetched.mkdir(exist_ok=True)
        (home / "sources.list").write_text(f"deb [signed-by={KEYRING}] {MIRROR} {release} main\n")
        apt = [
            "apt-get",
            "-qq",
            *("-o", f"Dir::Etc::sourcelist={home}/sources.list", "-o", "Dir::Etc::sourceparts=-"),
            *("-o", f"Dir::State::lists={home}/lists", "-o", f"Dir::Cache={home}/cache"),
            *("-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"),
        ]
        for command in (["update"], ["download", *names]):
            done = subprocess.run([*apt, *command], cwd=fetched, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(f"Debian's packages cannot be fetched: {done.stderr.strip()[-300:]}")
    root.mkdir()
    for package in sorted(fetched.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    shutil.rmtree(fetched)
    for name in ("iptables", "ip6tables", "iptables-save", "ip6tables-save", "iptables-restore"):
        link = root / "usr/sbin" / name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to("xtables-nft-multi")


def make_environment(folder: Path, root: Path) -> dict[str, str]:
    """Return the variables with which the unpacked programs find each other and their files."""
    plugins = folder / "config/cli-plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    for name in PLUGINS:
        link = plugins / name
        if not link.is_symlink():
            link.symlink_to(root / "usr/libexec/docker/cli-plugins" / name)
    places = [root / "usr/bin", root / "usr/sbin", "/usr/local/sbin", "/usr/sbin", "/sbin"]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "COMPOSE_"))},
        "PATH": ":".join([*map(str, places), os.environ["PATH"]]),
        "LD_LIBRARY_PATH": str(root / "usr/lib/x86_64-linux-gnu"),
        "XTABLES_LIBDIR": str(root / "usr/lib/x86_64-linux-gnu/xtables"),
        "PERL5LIB": str(root / "usr/share/perl5"),
        "DOCKER_HOST": f"unix://{folder}/docker.sock",
        "DOCKER_CONFIG": str(folder / "config"),
        "DOCKER_BUILDKIT": "1",
    }


def _answers(engine: Engine) -> bool:
    try:
        engine.docker("version", "--format", "{{.Server.Version}}", timeout=10)
    except (AssertionError, OSError, subprocess.TimeoutExpired):
        return False
    return True


if __name__ == "__main__":
    with own_engine(Path(sys.argv[1]).resolve()) as running:
        wanted = ("PATH", "LD_LIBRARY_PATH", "XTABLES_LIBDIR", "PERL5LIB", "DOCKER_HOST", "DOCKER_CONFIG")
        for variable in (*wanted, "DOCKER_BUILDKIT"):
            print(f"export {variable}={running.environment[variable]}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
