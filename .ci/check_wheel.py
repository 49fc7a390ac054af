"""Check the installed wheel: every module is there, imports, and nothing lies outside pyro_ext."""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

PACKAGES = {"pyro_ext": "pyro_ext", "models": "pyro_ext/models", "guides": "pyro_ext/guides"}

source = Path(sys.argv[1])
os.chdir("/")  # so that nothing is found in the source tree

files = {Path(file) for file in importlib.metadata.files("pyro-ext") or ()}
modules = {file for file in files if file.suffix == ".py"}
wanted = {
    Path(target, file.relative_to(source / folder))
    for folder, target in PACKAGES.items()
    for file in (source / folder).rglob("*.py")
}
if modules != wanted:
    sys.exit(f"Expected the modules of the source tree, but the wheel differs in {sorted(map(str, modules ^ wanted))}.")
if Path("pyro_ext/py.typed") not in files:
    sys.exit("Expected pyro_ext/py.typed in the wheel, but it is missing.")

for module in sorted(modules):
    parts = module.with_suffix("").parts
    importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
for name in ("models", "guides"):
    if importlib.util.find_spec(name) is not None:
        sys.exit(
            f"Expected no top-level package {name!r}, but the wheel installs one. See package-dir in pyproject.toml."
        )
print(f"wheel {importlib.metadata.version('pyro-ext')}: {len(modules)} modules import")
