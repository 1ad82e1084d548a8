"""The API reference: every module of a package, made from its docstrings, and where short names lead.

A page says ``<!-- modules: planish.ptq -->`` where the modules of a package belong, so that a new file is in the
reference without anyone thinking of it, and ``<!-- public -->`` for a table of the public names.
"""

from __future__ import annotations

import re
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

import planish
from planish_docs.tables import grid

MARK = re.compile(r"^<!-- (modules|public)(?:: ([\w. ]+))? -->$", re.MULTILINE)
# code, emphasis and the bullets of lists stay as they are; any other sign is escaped
_SIGNS = re.compile(r"(``.*?``|`[^`]*`)|(\*{1,2}\b[^*\n]+\b\*{1,2}|^ *\* )|(?<!\\)[|*]", re.MULTILINE | re.DOTALL)


def expand(text: str) -> str:
    """The text of a page with its marks replaced by Markdown."""
    return MARK.sub(lambda m: public_names() if m[1] == "public" else "\n\n".join(map(section, m[2].split())), text)


def modules(name: str) -> list[str]:
    """A module, or the public modules of a package in the order of the alphabet, those of its packages included."""
    module = import_module(name)
    if not hasattr(module, "__path__"):
        return [name]
    inside = [found.name for found in walk_packages(module.__path__, f"{name}.") if not found.ispkg]
    return sorted(found for found in inside if not found.rpartition(".")[2].startswith("_"))


def section(name: str) -> str:
    """A heading and the contents of each module of a package."""
    one = "## {0}\n\n```{{eval-rst}}\n.. automodule:: {0}\n   :members:\n```"
    return "\n\n".join(one.format(module) for module in modules(name))


def public_names() -> str:
    """A table of the names of ``planish`` with the first sentence of each."""
    rows = []
    for name in planish.__all__:
        if not name.startswith("_"):
            found = getattr(planish, name)
            role = "class" if isinstance(found, type) else "func"
            lead = (found.__doc__ or "").strip().partition("\n\n")[0]
            sentence = " ".join(lead.split()).replace("``", "`")
            rows.append((f"{{{role}}}`planish.{name} <{where(f'planish.{name}')}>`", sentence))
    return grid(("name", "what it is"), rows)


def where(name: str) -> str | None:
    """The full name of what a short one, such as ``planish.quantize``, was imported from; None if there is nothing."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                found = getattr(found, part)
        except (ImportError, AttributeError):
            continue
        module, inside = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
        return f"{module}.{inside}" if module and inside else None
    return None


def resolve(app: Any, env: Any, node: Any, content: Any) -> Any:
    """For Sphinx: a reference by a name that a package re-exports leads to where the thing is defined."""
    target = node.get("reftarget", "")
    full = where(target) if node.get("refdomain") == "py" and target.startswith("planish.") else None
    if not full or full == target:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], full, node, content)


def plain_signs(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """For Sphinx: ``|g|`` and ``*shape`` in a docstring are what they look like, no markup of reStructuredText."""
    text = "\n".join(lines)
    lines[:] = _SIGNS.sub(lambda m: m[1] or m[2] or f"\\{m[0]}", text).split("\n")
