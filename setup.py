"Reads everything from settings.ini, the one place for name, version and requirements."
from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {k.removesuffix("_requirements"): cfg[k].split() for k in cfg if k.endswith("_requirements")}
extras["all"] = sorted({r for name, rs in extras.items() if name not in ("dev", "openvino") for r in rs})

setuptools.setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="Apache-2.0",
    author=cfg["author"], url=cfg["git_url"], keywords=cfg["keywords"],
    packages=setuptools.find_packages(include=["modelzip", "modelzip.*"]), package_data={"modelzip": ["py.typed"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(), extras_require=extras,
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f'{cfg["lib_name"]}={cfg["lib_path"]}._modidx:d']},
    zip_safe=False,
)
