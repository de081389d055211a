"""Write what follows from the code: notes/specifications.md, config/ksync.toml, README.md's owner tables.

python -m tests.generate
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ksync_server import settings

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "notes" / "specifications.md"
README = REPOSITORY / "README.md"
CONFIG = REPOSITORY / "config" / "ksync.toml"
TOML_HEAD = """\
# ksync-server: every setting with its default.
#
# Relative paths count from the folder of this file. Sizes are in bytes (`_bytes`), times in seconds (`_s`).
# A key that does not exist is an error, never ignored; `ksync-server check-config --config FILE` says which.

# The table of offers; without this key the one that comes with the program is used.
# offers_file = "offers.toml\""""
FOLDERS = ("tests", "conformance")
HEAD = """# Specifications

Which section each test proves, collected from the `spec` marks of tests/ and conformance/ by `./run fix`.
"""


def references(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Iterator[str]:
    """The texts of `@pytest.mark.spec("...")` and `@spec("...")` on a function or class."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call):
            callee = decorator.func
            name = callee.attr if isinstance(callee, ast.Attribute) else getattr(callee, "id", "")
            if name == "spec":
                yield from (str(ast.literal_eval(argument)) for argument in decorator.args)


def collect() -> dict[str, list[str]]:
    """Section -> sorted `path::test` names."""
    found: dict[str, list[str]] = defaultdict(list)
    for folder in FOLDERS:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            where = path.relative_to(REPOSITORY)
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    for reference in references(node):
                        found[reference].append(f"{where}::{node.name}")
    return {section: sorted(set(tests)) for section, tests in found.items()}


def order(section: str) -> tuple[list[int], str]:
    """RFC number, then section numbers as numbers."""
    return [int(number) for number in re.findall(r"\d+", section)], section


def specifications() -> str:
    """The whole text of notes/specifications.md."""
    lines = [HEAD]
    standard = ""
    found = collect()
    for section in sorted(found, key=order):
        title, _, rest = section.partition(" \u00a7")
        if title != standard:
            standard = title
            lines.append(f"\n## {standard}\n")
        place = f"\u00a7{rest}" if rest else "as a whole"
        lines.append(f"- {place}: " + ", ".join(f"`{test}`" for test in found[section]))
    return "\n".join(lines) + "\n"


def owner_rows(product: str) -> str:
    """One table row per owner: the methods and reports it answers, in the order of the site's table."""
    site = importlib.import_module(f"ksync_server.{product}.site")
    by_owner: dict[str, list[str]] = defaultdict(list)
    for name, owner in site.OWNERS.items():
        by_owner[str(owner)].append(f"`{name}`")
    return "".join(f"| {owner} | {', '.join(names)} |\n" for owner, names in by_owner.items())


def readme(text: str) -> str:
    """The text of README.md with the rows of its owner tables as the sites have them."""
    for product in ("dav", "drive"):
        head = rf"(<!-- owners: {product} -->\n[^\n]*\n[^\n]*\n)(?:[^\n]*\|\n)*"
        rows = owner_rows(product)
        text, count = re.subn(head, r"\1" + rows.replace("\\", r"\\"), text)
        assert count == 1, f"README has no owner table of {product}"
    return text


def toml(value: object) -> str:
    """A setting's default as TOML."""
    match value:
        case bool():
            return str(value).lower()
        case int():
            return f"{value:_}"
        case float():
            return repr(value)
        case tuple():
            return f"[{', '.join(map(toml, value))}]"
        case _:
            return json.dumps(str(value))


def comments(section: type) -> dict[str, str]:
    """Field name -> the comment at the end of its line."""
    found = re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(section), re.MULTILINE)
    return dict(found)


def ksync_toml() -> str:
    """The whole text of config/ksync.toml: every setting with its default, and the comment of its field."""
    whole = settings.Settings()
    lines = [TOML_HEAD]
    for name in whole.__struct_fields__:
        section = getattr(whole, name)
        if isinstance(section, msgspec.Struct):
            said = comments(type(section))
            about = (inspect.getdoc(type(section)) or "") if "__doc__" in vars(type(section)) else ""
            lines.append("\n" + "".join(f"# {line}\n" for line in about.splitlines()) + f"[{name}]")
            for key in section.__struct_fields__:
                comment = f"  # {said[key]}" if key in said else ""
                value = getattr(section, key)
                # A key without a default is shown switched off.
                lines.append(
                    f'# {key} = "..."{comment}' if value is None else f"{key} = {toml(value)}{comment}"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(specifications(), "utf-8")
    CONFIG.write_text(ksync_toml(), "utf-8")
    README.write_text(readme(README.read_text("utf-8")), "utf-8")
