"""What is imported where."""

from __future__ import annotations

import subprocess
import sys


def test_nothing_of_data_juicer_is_imported_into_our_process() -> None:
    code = (
        "import sys, mgm_exp.data.data_juicer;"
        "heavy = {'data_juicer', 'datasets', 'torch', 'transformers', 'pyarrow', 'ray'} & set(sys.modules);"
        "from PIL import ImageFile;"
        "print(sorted(heavy), ImageFile.LOAD_TRUNCATED_IMAGES)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
