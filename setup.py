"""Build the Cython core (ext/*.pyx); everything else about the package is in pyproject.toml.

WALBD_EXT_DEBUG=1 builds with bounds checks and the address and undefined-behaviour sanitizers.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("WALBD_EXT_DEBUG") == "1"
HERE = Path(__file__).parent
sources = sorted((HERE / "ext").glob("*.pyx"))
if not sources:
    # A wheel without its extensions would install and then fail on the user's machine.
    raise SystemExit("setup.py: no ext/*.pyx found: refusing to build a package without its core")

compile_args = ["-O1", "-g", "-fsanitize=address,undefined"] if DEBUG else ["-O3", "-g0"]
link_args = ["-fsanitize=address,undefined"] if DEBUG else []
headers = [str(p.relative_to(HERE)) for p in sorted((HERE / "ext" / "src").glob("*.h"))]

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"walbd.ext.{path.stem}",
                [str(path.relative_to(HERE))],
                include_dirs=["ext/src"],
                depends=headers,
                extra_compile_args=compile_args,
                extra_link_args=link_args,
            )
            for path in sources
        ],
        build_dir="build/cython",
        include_path=["ext/src"],
        compiler_directives={
            "language_level": "3",
            "embedsignature": True,
            "freethreading_compatible": False,
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
        },
    )
)
