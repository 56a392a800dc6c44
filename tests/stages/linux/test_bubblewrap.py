"""The plan of a sandbox, as bubblewrap's arguments; what they do is tested with execute."""

import os
from itertools import pairwise
from pathlib import Path

import pytest

from stages.linux import bubblewrap

SANDBOX = bubblewrap.Sandbox(roots=[("/m/1", "/tmp/a"), ("/m/2", "/c/b")], hidden=["/c"])


def plan(sandbox: bubblewrap.Sandbox, **environment: str) -> list[str]:
    """Return the arguments for `true --flag`."""
    return bubblewrap.argv(sandbox, ["true", "--flag"], status_fd=7, environment=environment)


def index(words: list[str], *part: str) -> int:
    """Return where the part begins in the words."""
    return next(i for i in range(len(words)) if words[i : i + len(part)] == list(part))


def test_roots_come_after_masks_and_before_these_become_read_only() -> None:
    """A root in a masked folder is bound over the mask, while the mask can still take its mount point."""
    words = plan(SANDBOX)
    masks = [index(words, "--tmpfs", "/tmp"), index(words, "--tmpfs", "/c")]
    binds = [index(words, "--bind", "/m/1", "/tmp/a"), index(words, "--bind", "/m/2", "/c/b")]
    assert index(words, "--ro-bind", "/", "/") < min(masks) < max(masks) < min(binds)
    assert max(binds) < index(words, "--remount-ro", "/c")


def test_command_stands_last_as_it_is() -> None:
    """Options of the command are not taken for bubblewrap's."""
    assert plan(SANDBOX)[-3:] == ["--", "true", "--flag"]


def test_first_root_is_working_folder() -> None:
    """The command starts in the first root."""
    assert ("--chdir", "/tmp/a") in pairwise(plan(SANDBOX))


@pytest.mark.parametrize("network", [False, True])
def test_network_is_unshared_unless_wanted(network: bool) -> None:
    """Only a command that may use the network shares its caller's."""
    sandbox = bubblewrap.Sandbox(roots=[("/m", "/r")], network=network)
    assert ("--unshare-net" in plan(sandbox)) is not network


def test_caller_gets_own_ids_back_in_user_namespace() -> None:
    """In a user namespace, where the caller is root, the command runs under the caller's own ids."""
    words = plan(bubblewrap.Sandbox(roots=[("/m", "/r")], user_namespace=True))
    assert index(words, "--unshare-user", "--uid", str(os.geteuid()), "--gid", str(os.getegid()))


@pytest.mark.parametrize(("uid", "kept"), [(0, True), (1000, False)])
def test_capabilities_are_dropped(monkeypatch: pytest.MonkeyPatch, uid: int, kept: bool) -> None:
    """Root keeps what works on files, nobody keeps what works on mounts."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    pairs = list(pairwise(plan(SANDBOX)))
    assert ("--cap-drop", "ALL") in pairs
    assert (("--cap-add", "CAP_CHOWN") in pairs) is kept
    for name in ("CAP_SYS_ADMIN", "CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO"):
        assert ("--cap-add", name) not in pairs


def test_temporary_folder_variables_that_are_set_name_private_tmp() -> None:
    """TMPDIR and the like lead to the private /tmp if they were set, and are not set otherwise."""
    words = plan(SANDBOX, TMPDIR="/var/tmp/x")
    assert index(words, "--setenv", "TMPDIR", "/tmp")
    assert "TEMP" not in words


def test_bubblewrap_is_missing_without_it_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bubblewrap counts as missing when no folder of PATH holds it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bubblewrap.is_missing()
    (tmp_path / "bwrap").touch(mode=0o755)
    assert not bubblewrap.is_missing()
