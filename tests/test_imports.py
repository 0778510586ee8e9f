"""Imports point down, so that a part can be read, tested and changed without those above it."""

import ast
from pathlib import Path

import truetune

PACKAGE = Path(truetune.__file__).parent

# From the top. Modules of one line may import each other where they share the first word of their name.
LEVELS = (
    {"__main__"},
    {"cli"},
    {"doctor"},
    {"run", "launch"},
    {"recipe"},
    {"train", "export", "demo"},
    {"proof"},  # knows a trainer by what it can do, because a trainer runs it
    {"models", "readahead"},
    {"ops", "data", "cache", "host", "importing"},
)
ALONE = {"ops", "data"}  # may be used on their own: they import nothing else of ours


def part_of(module: str) -> str:
    """'truetune.run_model' and 'truetune.run' are one part, as are all of 'truetune.data'."""
    name = module.removeprefix("truetune").lstrip(".").partition(".")[0]
    return name if name.startswith("__") else name.partition("_")[0]


def level_of(part: str) -> int:
    found = [level for level, parts in enumerate(LEVELS) if part in parts]
    assert found, f"truetune.{part} has no place in the order of imports: give it one in tests/test_imports.py"
    return found[0]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module) for every import of truetune in a file, those inside functions included."""
    found = []
    package = ["truetune", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "truetune" else [module]
            found += [(node.lineno, name) for name in names]
    return [(line, name) for line, name in found if name.split(".")[0] == "truetune"]


def why_not(importer: str, imported: str) -> str | None:
    above, below = part_of(importer), part_of(imported)
    if below in ("", "__version__") or above == below:
        return None
    if above in ALONE:
        return f"{above} imports nothing else of truetune"
    if level_of(below) < level_of(above):
        return f"{below} is above {above}"
    if level_of(below) == level_of(above) and (above, below) != ("run", "launch"):
        return f"{below} is beside {above}"
    return None


def test_imports_point_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        importer = ".".join(["truetune", *path.relative_to(PACKAGE).with_suffix("").parts])
        if path == PACKAGE / "__init__.py":  # the public names, imported lazily
            continue
        level_of(part_of(importer))
        for line, imported in imports_of(path):
            if reason := why_not(importer, imported):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {imported}: {reason}")
    assert not wrong, "\n".join(wrong)


def test_the_order_is_the_designs():
    """What `why_not` must refuse and allow, so that the test above can fail."""
    for importer, imported in (
        ("truetune.data.rows", "truetune.models.errors"),
        ("truetune.ops.rope", "truetune.data.collate"),
        ("truetune.models.load", "truetune.train.config"),
        ("truetune.train.trainer", "truetune.recipe"),
        ("truetune.train.trainer", "truetune.demo.data"),
        ("truetune.recipe", "truetune.run_model"),
        ("truetune.run", "truetune.doctor"),
        ("truetune.recipe_values", "truetune.cli"),
    ):
        assert why_not(importer, imported), (importer, imported)
    for importer, imported in (
        ("truetune.cli", "truetune.data.audit"),
        ("truetune.recipe", "truetune.data.rows"),
        ("truetune.recipe", "truetune.train.config"),
        ("truetune.run", "truetune.launch"),
        ("truetune.run_model", "truetune.run_record"),
        ("truetune.doctor", "truetune.run_record"),
        ("truetune.train.trainer", "truetune.models.load"),
    ):
        assert why_not(importer, imported) is None, (importer, imported)


def test_public_names_are_imported_only_when_used():
    import subprocess
    import sys

    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'triton'}"
    code = f"import sys, truetune, truetune.cli; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
