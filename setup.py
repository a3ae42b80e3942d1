"""Where the package's folders lie; all other metadata is in pyproject.toml.

`data_prep` and `configs` lie at the top of a checkout. Installed, they lie inside of `fairseq_hash`: at the top of an
environment such names would be anybody's.
"""

from setuptools import find_packages, setup

INSIDE = {"fairseq_hash.data_prep": "data_prep", "fairseq_hash.configs": "configs"}

setup(
    packages=[*find_packages(include=["fairseq_hash*"]), *INSIDE],
    package_dir=INSIDE,
    package_data={
        "fairseq_hash": ["py.typed"],
        "fairseq_hash.configs": ["*.yaml", "*/*.yaml"],
        "fairseq_hash.reporting": ["assets/*", "vendor/*"],  # of its pages
    },
)
