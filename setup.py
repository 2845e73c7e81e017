"""What pyproject.toml cannot say: where `layerprune.kernels` comes from, and with what to build."""

import setuptools

# Without build isolation nobody else checks this, and older ones fail on the licence's new form.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"layerprune builds with setuptools >= 77, this is {setuptools.__version__}: "
        "run pip install --upgrade setuptools"
    )

setuptools.setup(
    packages=[
        *setuptools.find_packages(include=["layerprune", "layerprune.*"]),
        "layerprune.kernels",
    ],
    package_dir={"layerprune.kernels": "kernels"},
)
