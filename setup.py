"""Builds the CPU kernels, where there is a C++ compiler; everything else is in pyproject.toml.

Without a compiler the installation goes on: the plain torch path serves, and `slipstream doctor` says so.
"""

from glob import glob

from setuptools import Extension, setup

kernels = Extension(
    "shared.kernels._cpu",
    sources=[f"shared/kernels/cpu/{name}.cpp" for name in ("api", "team", "isa_scalar", "isa_avx2", "isa_avx512")],
    depends=sorted(glob("shared/kernels/cpu/*.h")),
    include_dirs=["shared/kernels/cpu"],
    extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)

setup(ext_modules=[kernels])
