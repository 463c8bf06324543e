"""A generation that one storage answered never comes back from another one with other contents."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.doctored import Doctored
from tests.kit.group import WAIT_S


def test_snapshots_that_were_never_delivered_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Doctored(tmp_path, storages=2) as group:
        volume = group.protect(mirror=1)
        ctl, (s0, s1), p0, a0 = group.ctl, group.s, group.p[0], group.a[0]
        ctl.stop(p0, "vol0")  # what is taken from here on is answered, and goes nowhere
        lost = [ctl.snapshot_nbk(s0, "vol0") for _ in range(5)]
        ctl.go_standby(s0, "vol0")
        volume.scribble()
        capsys.readouterr()
        gid = ctl.hash_backup(s1, "vol0", timeoutS=WAIT_S)
        assert "given it out" not in capsys.readouterr().err
        assert gid is not None
        assert gid > max(lost)
        known = ctl.get_restorable_gid(a0, "vol0", "all")
        assert not set(lost) & set(known)
        assert group.restored(volume, gid) == volume.model
        # The other way round the former target is gone, and out of the group file: nobody knows what it gave out.
        ctl.stop(s1, "vol0")
        group.kill("s1")
        ctl.set_server_layout(ctl.sLayout.replace(storageL=[s0]))
        again = ctl.hash_backup(s0, "vol0", timeoutS=WAIT_S)
        assert "no storage of the layout has given it out" in capsys.readouterr().err
        assert again is not None
        assert again > gid
        assert group.restored(volume, again) == volume.model
