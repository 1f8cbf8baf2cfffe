from __future__ import annotations

import subprocess
import sys


def test_reading_and_curating_import_no_torch() -> None:
    code = (
        "import sys, mgm_exp.data\n"
        "from mgm_exp.data import curate, read_rows, recaption, read_records, ImageChecks, source_fingerprint\n"
        "print([name for name in ('torch', 'transformers', 'numpy.random') if name in sys.modules][:2])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout and "transformers" not in done.stdout


def test_every_public_name_is_there() -> None:
    import mgm_exp.data

    for name in mgm_exp.data.__all__:
        assert getattr(mgm_exp.data, name) is not None
        assert getattr(mgm_exp.data, name).__class__.__name__ != "module"
