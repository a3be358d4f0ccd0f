"""Who imports whom, and what a page holds, read from sources: a dict of texts."""

import ast
from graphlib import CycleError, TopologicalSorter


def read(*folders):
    """Return the text of every Python file, by the name that imports it."""
    sources = {}
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        parts, folder = [file.stem], file.parent
        while (folder / "__init__.py").exists():
            parts.insert(0, folder.name)
            folder = folder.parent
        name = ".".join(parts).removesuffix(".__init__")
        sources[name] = file.read_text(encoding="utf-8")
    return sources


def import_graph(sources):
    """Return the modules that each module imports, those of its functions too."""
    return {
        name: {target for target, _, _ in _bindings(name, sources)} - {name}
        for name in sources
    }


def circle(graph):
    """Return the modules of a circle of imports, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def private_uses(sources):
    """Return what each module uses of another that has a leading underscore."""
    return sorted(
        {
            f"{name} uses {target}.{attribute}"
            for name in sources
            for target, attribute in _uses(name, sources)
            if attribute.startswith("_") and not attribute.startswith("__")
            if target != name
        }
    )


def crossings(graph, allowed):
    """Return the imports that a table of packages does not allow.

    The table names packages and modules by the part behind ``qm_cupy.``; each may
    import itself, and what its row lists.
    """
    return sorted(
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        if part(name) not in allowed
        or part(target) not in (part(name), *allowed[part(name)])
    )


def part(name):
    """Return the package or module of ``qm_cupy`` that a module is in."""
    return name.split(".")[1] if "." in name else name


def functions(text):
    """Return the names of the functions that a module defines."""
    return {x.name for x in ast.parse(text).body if isinstance(x, ast.FunctionDef)}


def missing_from_page(name, text):
    """Return which of function, reference and launcher a page lacks."""
    found = functions(text)
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            found.update(alias.asname or alias.name for alias in node.names)
    wanted = {
        "function": (name,),
        "reference": (f"{name}_reference", f"_{name}_reference"),
        "launcher": (f"{name}_cuda", f"_{name}_cuda"),
    }
    return {role for role, names in wanted.items() if not found.intersection(names)}


def long_files(files, most):
    """Return the files of more lines than `most`."""
    lengths = {file.name: len(file.read_text("utf-8").splitlines()) for file in files}
    return sorted(f"{name} has {n} lines" for name, n in lengths.items() if n > most)


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
                if f"{base}.{alias.name}" in sources:
                    yield f"{base}.{alias.name}", None, local
                elif base in sources:
                    yield base, alias.name, local


def _base(name, node, sources):
    """Return the absolute name of the module that a from-import names."""
    if not node.level:
        return node.module
    parts = name.split(".")
    is_package = any(other.startswith(f"{name}.") for other in sources)
    kept = len(parts) - node.level + is_package
    return ".".join([*parts[:kept], *([node.module] if node.module else [])])


def _uses(name, sources):
    """Yield (module, attribute) of what is imported, and of ``module.attribute``."""
    modules = {}
    for target, attribute, local in _bindings(name, sources):
        package, _, last = target.rpartition(".")
        yield package, last
        if attribute is None:
            modules[local] = target
        else:
            yield target, attribute
    for node in ast.walk(ast.parse(sources[name])):
        if isinstance(node, ast.Attribute):
            target = _module(node.value, modules, sources)
            if target is not None and f"{target}.{node.attr}" not in sources:
                yield target, node.attr


def _module(node, modules, sources):
    """Return the module that an expression such as ``qm_cupy.cuda`` stands for."""
    text = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
    if text in modules:
        return modules[text]
    head, _, last = text.rpartition(".")
    if not head:
        return None
    package = modules.get(head)
    name = f"{package}.{last}" if package else text
    return name if name in sources else None
