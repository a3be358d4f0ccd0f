"""Reads imports, names and lengths from sources, which are dictionaries of texts.

test_house.py checks the repository with these functions, and the functions themselves
with small sources.
"""

import ast
from graphlib import CycleError, TopologicalSorter


def read(*folders):
    """Return the text of every Python file by the module name that imports it."""
    sources = {}
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        parts, folder = [file.stem], file.parent
        while (folder / "__init__.py").exists():  # up to the outermost package
            parts.insert(0, folder.name)
            folder = folder.parent
        name = ".".join(parts).removesuffix(".__init__")
        sources[name] = file.read_text(encoding="utf-8")
    return sources


def import_graph(sources):
    """Return the modules that each module imports, also inside functions."""
    return {
        name: {target for target, _, _ in _bindings(name, sources)} - {name}
        for name in sources
    }


def circle(graph):
    """Return the modules of an import cycle, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]  # graphlib puts the cycle there
    return None


def private_uses(sources):
    """Return each use of a name with a leading underscore from another module."""
    return sorted(
        {
            f"{name} uses {target}.{attribute}"
            for name in sources
            for target, attribute in _uses(name, sources)
            # `__version__` is public.
            if attribute.startswith("_") and not attribute.startswith("__")
            if target != name
        }
    )


def crossings(graph, allowed):
    """Return the imports that a table of packages does not allow.

    The table names packages and modules by the part after ``qm_cupy.``. A package may
    import itself and the packages in its row.
    """
    return sorted(
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        # A package without a row may import nothing.
        if part(name) not in allowed
        or part(target) not in (part(name), *allowed[part(name)])
    )


def part(name):
    """Return the package or module of ``qm_cupy`` that contains a module."""
    return name.split(".")[1] if "." in name else name


def functions(text):
    """Return the names of the functions that a module defines."""
    return {x.name for x in ast.parse(text).body if isinstance(x, ast.FunctionDef)}


def missing_from_page(name, text):
    """Return the roles (function, reference, launcher) that a page does not have."""
    names_on_page = functions(text)
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            names_on_page.update(alias.asname or alias.name for alias in node.names)
    # A private reference or launcher is enough: only the page itself needs it.
    wanted = {
        "function": (name,),
        "reference": (f"{name}_reference", f"_{name}_reference"),
        "launcher": (f"{name}_cuda", f"_{name}_cuda"),
    }
    return {
        role for role, names in wanted.items() if not names_on_page.intersection(names)
    }


def long_files(files, limit):
    """Return the files that have more lines than a limit."""
    lengths = {file.name: len(file.read_text("utf-8").splitlines()) for file in files}
    return sorted(f"{name} has {n} lines" for name, n in lengths.items() if n > limit)


def _bindings(name, sources):
    """Yield (module, attribute or None, local name) of each import from `sources`."""
    for node in ast.walk(ast.parse(sources[name])):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in sources:
                    local = alias.asname or alias.name
                    yield alias.name, None, local
        elif isinstance(node, ast.ImportFrom):
            base = _base(name, node, sources)
            for alias in node.names:
                local = alias.asname or alias.name
                # `from package import module` binds a module, not an attribute.
                if f"{base}.{alias.name}" in sources:
                    yield f"{base}.{alias.name}", None, local
                elif base in sources:
                    yield base, alias.name, local


def _base(name, node, sources):
    """Return the absolute name of the module in a ``from`` import."""
    if not node.level:
        return node.module
    parts = name.split(".")
    # In a package's own file, one dot is the package itself.
    is_package = any(other.startswith(f"{name}.") for other in sources)
    kept = len(parts) - node.level + is_package
    return ".".join([*parts[:kept], *([node.module] if node.module else [])])


def _uses(name, sources):
    """Yield (module, attribute) of every import and of every ``module.attribute``."""
    modules = {}
    for target, attribute, local in _bindings(name, sources):
        # An import of a private module uses a private name of its package.
        package, _, last = target.rpartition(".")
        yield package, last
        if attribute is None:
            modules[local] = target
        else:
            yield target, attribute
    # Attributes of imported modules: `import a; a.b` uses `b` as `from a import b`
    # does.
    for node in ast.walk(ast.parse(sources[name])):
        if isinstance(node, ast.Attribute):
            target = _module(node.value, modules, sources)
            if target is not None and f"{target}.{node.attr}" not in sources:
                yield target, node.attr


def _module(node, modules, sources):
    """Return the module that an expression such as ``qm_cupy.cuda`` refers to."""
    text = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
    if text in modules:
        return modules[text]
    head, _, last = text.rpartition(".")
    if not head:
        return None
    package = modules.get(head)
    name = f"{package}.{last}" if package else text
    return name if name in sources else None
